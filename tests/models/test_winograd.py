"""Winograd's convolution is the direct sum, in every mode of differentiation and mapping, in float64."""

import jax
import numpy as np
import pytest

from attrib_jax.models.layers import Conv
from attrib_jax.models.winograd import transform_kernel, winograd_conv

jnp = jax.numpy

_RNG = np.random.default_rng(0)
_KERNEL = _RNG.normal(size=(3, 3, 5, 7))
_KERNELS = _RNG.normal(size=(2, 3, 3, 5, 7))


def _direct(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout)


def _loss(conv):
    """Not linear, so that second derivatives are not zero."""
    return lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel)))


def _mapped_loss(conv):
    return lambda x, kernel: jnp.sum(jnp.sin(jax.vmap(conv, (0, None))(x, kernel)))


# Functions of the convolution and of pictures (2, 3, H, W, 5).
_MODES = {
    "forward": lambda conv, x: jax.jit(conv)(x[0], _KERNEL),
    "eager": lambda conv, x: conv(x[0], _KERNEL),
    "inner batch axis": lambda conv, x: jax.vmap(conv, (1, None), 1)(x, _KERNEL),
    "a kernel each": lambda conv, x: jax.vmap(conv)(x, _KERNELS),
    "kernels alone": lambda conv, x: jax.vmap(conv, (None, 0))(x[0], _KERNELS),
    "gradients of a batch": lambda conv, x: jax.grad(_mapped_loss(conv), (0, 1))(x, _KERNEL),
    "gradients of examples": lambda conv, x: jax.vmap(jax.grad(_loss(conv), (0, 1)), (0, None))(x, _KERNEL),
    "gradients of models": lambda conv, x: jax.vmap(jax.grad(_loss(conv), (0, 1)))(x, _KERNELS),
    "forward mode": lambda conv, x: jax.jvp(_mapped_loss(conv), (x, _KERNEL), (jnp.cos(x), jnp.cos(_KERNEL))),
    "forward over reverse": lambda conv, x: jax.jvp(
        jax.grad(_mapped_loss(conv), (0, 1)), (x, _KERNEL), (jnp.cos(x), jnp.cos(_KERNEL))
    ),
    "recomputed": lambda conv, x: jax.grad(jax.checkpoint(_mapped_loss(conv)), (0, 1))(x, _KERNEL),
}


# The kernel's derivative has two forms: in the modes that take it of a batch of 3, few pixels are of the one, many of
# the other.
@pytest.mark.parametrize("height, width", [(2, 6), (4, 6)])
@pytest.mark.parametrize("mode", list(_MODES))
def test_equals_the_direct_sum(mode, height, width):
    x = np.random.default_rng(1).normal(size=(2, 3, height, width, 5))
    with jax.enable_x64(True):
        found, expected = (_MODES[mode](conv, x) for conv in (winograd_conv, _direct))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


# Modes that differentiate and map pictures alone.
_PICTURE_MODES = {
    "forward": lambda conv, x: jax.jit(conv)(x[0]),
    "eager": lambda conv, x: conv(x[0]),
    "inner batch axis": lambda conv, x: jax.vmap(conv, 1, 1)(x),
    "gradients of examples": lambda conv, x: jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x)))))(x),
    "forward mode": lambda conv, x: jax.jvp(conv, (x[0],), (jnp.cos(x[0]),)),
    "forward over reverse": lambda conv, x: jax.jvp(
        jax.grad(lambda x: jnp.sum(jnp.sin(conv(x)))), (x[0],), (jnp.cos(x[0]),)
    ),
    "transposed twice": lambda conv, x: jax.linear_transpose(
        lambda y: jax.linear_transpose(conv, x[0])(y)[0], jnp.zeros((3, *x.shape[2:4], 7))
    )(x[0]),
    "recomputed": lambda conv, x: jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(conv(x)))))(x[0]),
}


@pytest.mark.parametrize("mode", list(_PICTURE_MODES))
def test_a_transformed_kernel_gives_the_kernels_numbers(mode):
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 6, 5))
    with jax.enable_x64(True):
        found, expected = (
            _PICTURE_MODES[mode](lambda x, kernel=kernel: winograd_conv(x, kernel), x)
            for kernel in (transform_kernel(_KERNEL), _KERNEL)
        )
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-14 * np.abs(other).max())


def test_a_transformed_kernel_has_no_derivative_and_is_not_mapped():
    x = jnp.zeros((1, 4, 4, 5))
    kernel = transform_kernel(jnp.asarray(_KERNEL, jnp.float32))
    with pytest.raises(TypeError, match="give the convolution the kernel itself"):
        jax.grad(lambda filters: jnp.sum(winograd_conv(x, kernel._replace(filters=filters))))(kernel.filters)
    several = jax.vmap(transform_kernel)(jnp.asarray(_KERNELS, jnp.float32))
    with pytest.raises(TypeError, match="map over the kernels themselves"):
        jax.vmap(winograd_conv, (None, 0))(x, several)


def test_float32_errors_are_within_a_few_roundings():
    """Of the largest result: 2e-7 for the direct sum."""
    x, kernel, cotangent = (_RNG.normal(size=size) for size in ((4, 16, 16, 64), (3, 3, 64, 64), (4, 16, 16, 64)))
    with jax.enable_x64(True):
        expected = jax.vjp(_direct, x, kernel)
        expected = [expected[0], *expected[1](cotangent)]
    found = jax.vjp(winograd_conv, *(jnp.asarray(array, jnp.float32) for array in (x, kernel)))
    found = [found[0], *found[1](jnp.asarray(cotangent, jnp.float32))]
    for one, other in zip(found, expected):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize(
    "side, channels, dtype, expected",
    [(16, 32, jnp.float32, True), (2, 32, jnp.float32, False), (15, 32, jnp.float32, False)]
    + [(16, 16, jnp.float32, False), (16, 32, jnp.bfloat16, False)],
)
def test_where_a_convolution_takes_this_form(side, channels, dtype, expected):
    conv = Conv(channels)
    x = jnp.zeros((1, side, side, channels), dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), conv.init(jax.random.key(0), x))
    found = "winograd_conv" in str(jax.make_jaxpr(conv.apply)(params, x))
    assert found == (expected and jax.default_backend() == "cpu")
