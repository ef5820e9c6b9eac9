"""Norms that are written for a CPU's speed give what the plain forms give, in both modes of differentiation."""

import jax
import jax.export
import numpy as np
import pytest

from attrib_jax.ops import group_norm, layer_norm

jnp = jax.numpy


def _group_norm(x, scale, bias):
    return group_norm(x, scale, bias, 2, 1e-5)


def _layer_norm(x, scale, bias):
    return layer_norm(x, scale, bias, 1e-5)


def _plain(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def _plain_group_norm(x, scale, bias):
    return _plain(x.reshape(x.shape[0], -1, 2, x.shape[-1] // 2), (1, 3)).reshape(x.shape) * scale + bias


def _plain_layer_norm(x, scale, bias):
    return _plain(x, -1) * scale + bias


@pytest.mark.parametrize("norm, plain", [(_group_norm, _plain_group_norm), (_layer_norm, _plain_layer_norm)])
def test_results_and_derivatives_are_those_of_the_plain_form(norm, plain):
    rng = np.random.default_rng(0)

    def modes(norm, *arrays):
        def loss(x, scale, bias):
            return jnp.sum(jnp.sin(norm(x, scale, bias)))

        gradient, tangents = jax.grad(loss, (0, 1, 2)), tuple(map(jnp.cos, arrays))
        each = jax.vmap(lambda x, *weights: gradient(x[None], *weights), (0, None, None))
        return (
            norm(*arrays),
            gradient(*arrays),
            each(*arrays),
            jax.jvp(norm, arrays, tangents),
            jax.jvp(gradient, arrays, tangents),
        )

    with jax.enable_x64(True):
        arrays = tuple(rng.normal(size=shape) for shape in ((3, 5, 5, 4), (4,), (4,)))
        found, expected = (jax.jit(modes, static_argnums=0)(fn, *arrays) for fn in (norm, plain))
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("norm", [_group_norm, _layer_norm])
def test_statistics_of_half_precision_numbers_are_float32(norm):
    x = np.random.default_rng(0).normal(size=(2, 64, 4)) + 30
    x, weights = jnp.asarray(x, jnp.bfloat16), (jnp.ones(4, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16))
    found, expected = norm(x, *weights), norm(x.astype(jnp.float32), *(w.astype(jnp.float32) for w in weights))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform, written", [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_a_cotangent_is_written_to_memory_on_a_cpu_in_reverse_mode_alone(platform, written):
    arrays = jnp.ones((2, 3, 4)), jnp.ones(4), jnp.ones(4)
    gradient = jax.grad(lambda *arrays: jnp.sum(_group_norm(*arrays)))
    each = jax.vmap(lambda x, *weights: gradient(x[None], *weights), (0, None, None))
    forward_mode = lambda *arrays: jax.jvp(_group_norm, arrays, arrays)  # noqa: E731
    for function, expected in ((_group_norm, 0), (forward_mode, 0), (gradient, written), (each, written)):
        module = jax.export.export(jax.jit(function), platforms=(platform,))(*arrays).mlir_module()
        assert module.count("stablehlo.optimization_barrier") == expected
