"""Attention: against torch, with one text for all queries, and block by block of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.ops import attention


def make_inputs(queries=11, keys=7, width=12, batch=2):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, width)).astype(np.float32) for length in (queries, keys, keys)]


def test_attention_is_torchs():
    inputs = make_inputs()
    heads = [torch.from_numpy(x).unflatten(-1, (3, 4)).transpose(1, 2) for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(attention(*inputs, num_heads=3), expected, atol=1e-6)


def modes(inputs, **limit):
    """Values and derivatives; and the values of each query mapped, with one text for all."""

    def loss(*inputs):
        return jnp.sum(jnp.cos(attention(*inputs, num_heads=3, **limit)))

    tangents = [jnp.ones_like(x) for x in inputs]
    query, *shared = inputs[0], inputs[1][:1], inputs[2][:1]
    mapped = jax.vmap(lambda query: attention(query[None], *shared, 3, **limit))(query)
    return mapped, jax.value_and_grad(loss, (0, 1, 2))(*inputs), jax.jvp(loss, inputs, tangents)


@pytest.mark.parametrize("logits_at_once", [2 * 3 * 7 * 4, 1])
def test_blocks_of_queries_change_neither_values_nor_derivatives(logits_at_once):
    """Of 11 queries in blocks of four the last has three, and a block of one query is the smallest."""
    inputs = make_inputs()
    found = jax.jit(lambda inputs: modes(inputs, logits_at_once=logits_at_once))
    assert "while" in found.lower(inputs).as_text()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found(inputs), jax.jit(modes)(inputs)
    )


def test_large_attention_holds_no_logits_of_all_queries():
    """The first level of Stable Diffusion at 512 pixels, 512 MiB of logits an image, forward and backward."""
    shape = jax.ShapeDtypeStruct((1, 4096, 320), np.float32)

    def loss(*inputs):
        return jnp.sum(jnp.square(attention(*inputs, num_heads=8)))

    for fn in (loss, jax.grad(loss, (0, 1, 2))):
        memory = jax.jit(fn).lower(shape, shape, shape).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 300 * 2**20


def test_keys_and_values_of_one_example_are_those_of_all():
    query, key, value = make_inputs(batch=3)

    def loss(query, key, value):
        return jnp.sum(jnp.cos(attention(query, key, value, num_heads=3)))

    def of_each(query, key, value):
        return sum(loss(query[i : i + 1], key, value) for i in range(3))

    found, expected = (jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(query, key[:1], value[:1]) for fn in (loss, of_each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
