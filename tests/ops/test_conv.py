"""Convolutions are the direct sum in every mode of differentiation and mapping, and each platform gets its own form."""

import jax
import jax.export
import numpy as np
import pytest

from attrib_jax.ops import TransformedKernel, conv2d, prepare_kernels, upsample_conv2d

jnp = jax.numpy

_SAME = ((1, 1), (1, 1))
_BELOW = ((0, 1), (0, 1))


def _direct(x, kernel, stride=1, padding=_SAME):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def _plain(stride=1, padding=_SAME):
    """Ours and the direct sum, as functions of images and a kernel."""
    return lambda x, k: conv2d(x, k, stride, padding), lambda x, k: _direct(x, k, stride, padding)


def _upsampled(height, width):
    def direct(x, kernel):
        return _direct(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width], kernel)

    return lambda x, k: upsample_conv2d(x, k, (height, width)), direct


# Ours and the direct sum; height and width of the images, channels in and out, size of the kernel, and the dtype:
# float32 for the forms that are for it alone.
_CASES = {
    # The gradients of Winograd's form have two forms each, which follow the number of pixels of the batch.
    "winograd, few pixels": (*_plain(), (4, 4), 32, 33, 3, "float32"),
    "winograd": (*_plain(), (4, 8), 32, 33, 3, "float32"),
    "winograd, many pixels": (*_plain(), (10, 10), 32, 33, 3, "float32"),
    "doubled": (*_upsampled(6, 4), (3, 2), 32, 33, 3, "float32"),
    "doubled, one pixel": (*_upsampled(2, 2), (1, 1), 32, 33, 3, "float32"),
    "doubled, cut": (*_upsampled(5, 4), (3, 2), 32, 33, 3, "float32"),
    "doubled, few channels": (*_upsampled(6, 3), (3, 2), 5, 6, 3, "float64"),
    "direct": (*_plain(), (5, 6), 5, 6, 3, "float64"),
    "1x1": (*_plain(padding=((0, 0), (0, 0))), (5, 6), 5, 6, 1, "float64"),
    "few pixels": (*_plain(), (2, 2), 5, 6, 3, "float64"),
    "strided": (*_plain(2), (8, 7), 5, 6, 3, "float64"),
    "strided, many pixels": (*_plain(2), (18, 18), 5, 6, 3, "float64"),
    "strided, padded below": (*_plain(2, _BELOW), (8, 8), 5, 6, 3, "float64"),
    "few channels in": (*_plain(), (5, 5), 4, 36, 3, "float64"),
    "few channels out": (*_plain(), (5, 5), 36, 4, 3, "float64"),
    "few channels out, padded below": (*_plain(padding=_BELOW), (5, 5), 36, 4, 3, "float64"),
}


def _modes(conv, x, kernels):
    """Results of a convolution of images x (2, 3, H, W, C) and kernels (2, h, w, C, F) in all modes."""

    def loss(x, kernel):  # not linear, so that second derivatives are not zero
        return jnp.mean(jnp.sin(conv(x, kernel)))

    def shared_images(x, kernels):
        return jnp.mean(jnp.sin(jax.vmap(conv, (None, 0))(x, kernels)))

    kernel, gradient = kernels[0], jax.grad(loss, (0, 1))
    tangents = jnp.cos(x[0]), jnp.cos(kernel)
    return {
        "forward": conv(x[0], kernel),
        "inner batch axis": jax.vmap(conv, (1, None), 1)(x, kernel),
        "a kernel each": jax.vmap(conv)(x, kernels),
        "a kernel each, images mapped twice": jax.vmap(jax.vmap(conv, (0, None)), (None, 0))(x, kernels),
        "gradients of examples": jax.vmap(gradient, (0, None))(x, kernel),
        "gradients of models": jax.vmap(gradient)(x, kernels),
        "gradients of models' examples": jax.vmap(jax.vmap(gradient, (0, None)), (None, 0))(x, kernels),
        "gradients of models by shared images": jax.grad(shared_images, (0, 1))(x[0], kernels),
        "forward mode": jax.jvp(conv, (x[0], kernel), tangents),
        "forward over reverse": jax.jvp(gradient, (x[0], kernel), tangents),
        "recomputed": jax.grad(jax.checkpoint(loss), (0, 1))(x[0], kernel),
    }


@pytest.mark.parametrize("case", list(_CASES))
def test_equals_the_direct_sum(case):
    conv, direct, size, channels, features, side, dtype = _CASES[case]
    rng = np.random.default_rng(0)
    x, kernels = rng.normal(size=(2, 3, *size, channels)), rng.normal(size=(2, side, side, channels, features))
    with jax.enable_x64(True):
        expected = jax.jit(_modes, static_argnums=0)(direct, x, kernels)
        found = jax.jit(_modes, static_argnums=0)(conv, x.astype(dtype), kernels.astype(dtype))
        for mode in expected:
            for one, other in zip(*map(jax.tree.leaves, (found[mode], expected[mode])), strict=True):
                assert one.shape == other.shape and one.dtype == dtype
                error = np.abs(one - other).max() / np.abs(other).max()
                # The sums have up to 300 terms, of which sine and cosine are then taken.
                assert error < (1e-12 if dtype == "float64" else 2e-5), mode


@pytest.fixture
def prepared():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 32, 33)).astype(np.float32)
    return prepare_kernels({"kernel": jnp.asarray(kernel)}, "cpu")["kernel"]


@pytest.mark.parametrize("conv", [_plain()[0], _plain(2)[0], upsample_conv2d], ids=["plain", "strided", "upsampled"])
def test_a_prepared_kernel_gives_the_kernels_numbers(prepared, conv):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 6, 32)), jnp.float32)

    @jax.jit
    def run(kernel):
        of_images = lambda x: conv(x, kernel)  # noqa: E731
        gradient, transposed = jax.grad(lambda x: jnp.sum(jnp.sin(of_images(x)))), jax.linear_transpose
        return (
            of_images(x[0]),
            jax.vmap(of_images, 1, 1)(x),
            jax.vmap(gradient)(x),
            jax.jvp(gradient, (x[0],), (jnp.cos(x[0]),)),
            transposed(lambda y: transposed(of_images, x[0])(y)[0], jax.eval_shape(of_images, x[0]))(x[0]),
        )

    for one, other in zip(*map(jax.tree.leaves, (run(prepared), run(prepared.kernel))), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def test_a_prepared_kernel_has_no_derivative_and_is_not_mapped(prepared):
    x, conv = jnp.zeros((1, 4, 4, 32)), _plain()[0]
    with pytest.raises(TypeError, match="TransformedKernel"):
        jax.grad(lambda kernel: jnp.sum(conv(x, kernel)))(prepared)
    with pytest.raises(TypeError, match="TransformedKernel"):
        jax.vmap(conv, (None, 0))(x, jax.tree.map(lambda leaf: leaf[None], prepared))


def test_which_kernels_are_prepared():
    shapes = {
        "large": (3, 3, 32, 64),
        "few in": (3, 3, 31, 64),
        "few out": (3, 3, 64, 31),
        "pointwise": (1, 1, 64, 64),
        "matrix": (64, 64),
    }
    params = {"layer": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    params["half"] = jnp.ones((3, 3, 32, 32), jnp.bfloat16)
    assert prepare_kernels(params, "tpu") is params
    found = prepare_kernels(params, "cpu")
    transformed = [name for name, leaf in found["layer"].items() if isinstance(leaf, TransformedKernel)]
    assert transformed == ["large"] and found["half"] is params["half"]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_platform_decides_when_a_program_is_lowered(platform):
    """A CPU's program has matrix products in place of convolutions, and no other platform's has."""
    on_cpu = platform == "cpu"

    def count(conv, size, channels, features, dtype=jnp.float32, prepare=False):
        x = jax.ShapeDtypeStruct((2, *size, channels), dtype)
        kernel = jax.ShapeDtypeStruct((3, 3, channels, features), dtype)
        if prepare:
            kernel = TransformedKernel(kernel, (jax.ShapeDtypeStruct((4, channels, features), dtype),) * 4)

        def gradients(x, kernel):
            with jax.default_matmul_precision("highest"):
                return jax.vjp(lambda x: conv(x, kernel), x)[1](conv(x, kernel))

        module = jax.export.export(jax.jit(gradients), platforms=(platform,))(x, kernel).mlir_module()
        convolutions = [line for line in module.splitlines() if "stablehlo.convolution" in line]
        assert all("HIGHEST" in line for line in convolutions)
        return len(convolutions), module.count("stablehlo.dot_general")

    # The forward pass and the input gradient.
    for prepare in (False, True):
        assert count(_plain()[0], (8, 8), 32, 32, prepare=prepare) == ((0, 2 * 4) if on_cpu else (2, 0))
    assert count(upsample_conv2d, (4, 4), 32, 32) == ((0, 2 * 9) if on_cpu else (2, 0))
    for channels, features in ((4, 36), (36, 4)):
        assert count(_plain()[0], (8, 8), channels, features) == ((0, 2) if on_cpu else (2, 0))
    # Half precision would lose digits in Winograd's transforms and in shifted sums; there is an upper limit to each.
    for size, channels, features, dtype in (
        ((8, 8), 32, 32, jnp.bfloat16),
        ((8, 8), 36, 4, jnp.bfloat16),
        ((8, 8), 35, 4, jnp.float32),
        ((8, 8), 5, 36, jnp.float32),
        ((7, 8), 32, 32, jnp.float32),
        ((2, 4), 32, 32, jnp.float32),
    ):
        assert count(_plain()[0], size, channels, features, dtype) == (2, 0)
