"""Attention: against torch, and block by block of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.models import layers


def make_inputs(queries=11, keys=7, width=12, batch=2):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, width)).astype(np.float32) for length in (queries, keys, keys)]


def test_attention_is_torchs():
    inputs = make_inputs()
    heads = [torch.from_numpy(x).unflatten(-1, (3, 4)).transpose(1, 2) for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(layers.attention(*inputs, num_heads=3), expected, atol=1e-6)


@pytest.mark.parametrize("logits_at_once", [2 * 3 * 7 * 4, 1])
def test_blocks_of_queries_change_neither_values_nor_derivatives(monkeypatch, logits_at_once):
    """Of 11 queries in blocks of four the last has three, and a block of one query is the smallest."""
    inputs = make_inputs()

    def loss(*inputs):
        return jnp.sum(jnp.cos(layers.attention(*inputs, num_heads=3)))

    def all_of(inputs):
        tangents = [np.ones_like(x) for x in inputs]
        mapped = jax.vmap(lambda query: layers.attention(query[None], inputs[1][:1], inputs[2][:1], 3))(inputs[0])
        return mapped, jax.value_and_grad(loss, (0, 1, 2))(*inputs), jax.jvp(loss, inputs, tangents)

    expected = all_of(inputs)
    monkeypatch.setattr(layers, "_LOGITS_AT_ONCE", logits_at_once)
    assert "while" in jax.jit(loss).lower(*inputs).as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), all_of(inputs), expected)


def test_large_attention_holds_no_logits_of_all_queries():
    """The first level of Stable Diffusion at 512 pixels, 512 MiB of logits a picture, forward and backward."""
    shape = jax.ShapeDtypeStruct((1, 4096, 320), np.float32)

    def loss(*inputs):
        return jnp.sum(jnp.square(layers.attention(*inputs, num_heads=8)))

    for fn in (loss, jax.grad(loss, (0, 1, 2))):
        memory = jax.jit(fn).lower(shape, shape, shape).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 300 * 2**20


def test_keys_and_values_of_one_example_are_those_of_all():
    query, key, value = make_inputs(batch=3)
    shared = key[:1], value[:1]

    def loss(query, key, value):
        return jnp.sum(jnp.cos(layers.attention(query, key, value, num_heads=3)))

    def of_each(query, key, value):
        return sum(loss(query[i : i + 1], key, value) for i in range(3))

    found, expected = (jax.value_and_grad(fn, (0, 1, 2))(query, *shared) for fn in (loss, of_each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("keys_of", [1, 4])
def test_a_group_counts_as_one_example(monkeypatch, keys_of):
    query, key, value = make_inputs(batch=4)
    inputs = query, key[:keys_of], value[:keys_of]
    monkeypatch.setattr(layers, "_LOGITS_AT_ONCE", 3 * 11 * 7)
    for group, in_blocks in ((1, True), (4, False)):
        run = jax.jit(lambda *inputs, group=group: layers.attention(*inputs, num_heads=3, group=group))
        assert ("while" in run.lower(*inputs).as_text()) == in_blocks
