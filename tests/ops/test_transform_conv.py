"""Convolutions by a transformed kernel are the direct sum, in every mode of differentiation and mapping, in float64."""

import jax
import numpy as np
import pytest

from attrib_jax.models.layers import Conv
from attrib_jax.ops.upsample_conv import doubled_conv
from attrib_jax.ops.winograd import winograd_conv

jnp = jax.numpy

_RNG = np.random.default_rng(0)
_KERNEL = _RNG.normal(size=(3, 3, 5, 7))
_KERNELS = _RNG.normal(size=(2, 3, 3, 5, 7))


def _direct(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout)


def _direct_doubled(x, kernel):
    return _direct(jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2), kernel)


_FORMS = {"winograd": (winograd_conv, _direct), "doubled": (doubled_conv, _direct_doubled)}


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


# Winograd's derivatives have two forms each. That by the kernel has one for the first case in the modes that take it of
# a batch of 3, another for the second; that by the pictures changes with the third.
@pytest.mark.parametrize(
    "form, height, width",
    [("winograd", 2, 6), ("winograd", 4, 6), ("winograd", 10, 10), ("doubled", 1, 1), ("doubled", 3, 2)],
)
@pytest.mark.parametrize("mode", list(_MODES))
def test_equals_the_direct_sum(mode, form, height, width):
    x = np.random.default_rng(1).normal(size=(2, 3, height, width, 5))
    with jax.enable_x64(True):
        found, expected = (_MODES[mode](conv, x) for conv in _FORMS[form])
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
        lambda y: jax.linear_transpose(conv, x[0])(y)[0], jax.eval_shape(conv, x[0])
    )(x[0]),
    "recomputed": lambda conv, x: jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(conv(x)))))(x[0]),
}


@pytest.mark.parametrize("form", list(_FORMS))
@pytest.mark.parametrize("mode", list(_PICTURE_MODES))
def test_a_transformed_kernel_gives_the_kernels_numbers(mode, form):
    conv = _FORMS[form][0]
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 6, 5))
    with jax.enable_x64(True):
        found, expected = (
            _PICTURE_MODES[mode](lambda x, kernel=kernel: conv(x, kernel), x)
            for kernel in (conv.prepare(_KERNEL), _KERNEL)
        )
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-14 * np.abs(other).max())


@pytest.mark.parametrize("form", list(_FORMS))
def test_a_transformed_kernel_has_no_derivative_and_is_not_mapped(form):
    conv = _FORMS[form][0]
    x = jnp.zeros((1, 4, 4, 5))
    kernel = conv.prepare(jnp.asarray(_KERNEL, jnp.float32))
    with pytest.raises(TypeError, match="give the convolution the kernel itself"):
        jax.grad(lambda filters: jnp.sum(conv(x, kernel._replace(filters=filters))))(kernel.filters)
    several = jax.vmap(conv.prepare)(jnp.asarray(_KERNELS, jnp.float32))
    with pytest.raises(TypeError, match="map over the kernels themselves"):
        jax.vmap(conv, (None, 0))(x, several)


@pytest.mark.parametrize("form, side", [("winograd", 16), ("doubled", 8)])
def test_float32_errors_are_within_a_few_roundings(form, side):
    """Of the largest result: 2e-7 for the direct sum."""
    conv, direct = _FORMS[form]
    sizes = ((4, side, side, 64), (3, 3, 64, 64), (4, 16, 16, 64))
    x, kernel, cotangent = (np.random.default_rng(2).normal(size=size) for size in sizes)
    with jax.enable_x64(True):
        expected = jax.vjp(direct, x, kernel)
        expected = [expected[0], *expected[1](cotangent)]
    found = jax.vjp(conv, *(jnp.asarray(array, jnp.float32) for array in (x, kernel)))
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


@pytest.mark.parametrize("doubled_to, dtype, expected", [((4, 6), "float32", True), ((4, 6), "float64", False)])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_doubled_picture_is_cut_before_it_is_convolved(doubled_to, dtype, expected, cut):
    doubled_to = (doubled_to[0] - cut, doubled_to[1])
    with jax.enable_x64(True):
        conv, x = Conv(32), jnp.asarray(_RNG.normal(size=(2, 2, 3, 32)), dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), conv.init(jax.random.key(0), x))
        found = conv.apply(params, x, doubled_to)
        plain = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : doubled_to[0]]
        np.testing.assert_allclose(found, _direct(plain, params["params"]["kernel"]), rtol=0, atol=1e-5)
        jaxpr = str(jax.make_jaxpr(lambda params: conv.apply(params, x, doubled_to))(params))
    assert ("doubled_conv" in jaxpr) == (expected and not cut and jax.default_backend() == "cpu")
