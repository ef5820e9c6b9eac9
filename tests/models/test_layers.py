"""Layers that are written for a CPU's speed give what the plain forms give, in both modes of differentiation."""

import jax
import numpy as np
import pytest
from jax import export

from attrib_jax.models.layers import Conv, GroupNorm, LayerNorm
from attrib_jax.ops.barrier import materialise_cotangent

jnp = jax.numpy


def _plain_group_norm(params, x):
    grouped = x.reshape(x.shape[0], -1, 2, x.shape[-1] // 2)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
    return normed.reshape(x.shape) * params["scale"] + params["bias"]


def _plain_layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def _plain_conv(layer):
    def apply(params, x):
        strides, layout = (layer.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params["kernel"], strides, layer.padding, dimension_numbers=layout)
        return y + params["bias"]

    return apply


_POINTWISE, _STRIDED, _BELOW = (
    Conv(6, kernel_size=1, padding=((0, 0), (0, 0))),
    Conv(6, stride=2),
    Conv(6, stride=2, padding=((0, 1), (0, 1))),
)
_WIDE, _WIDE_STRIDED, _NARROW, _NARROW_BELOW = (
    Conv(36),
    Conv(36, stride=2),
    Conv(4),
    Conv(4, padding=((0, 1), (0, 1))),
)
# A layer, its plain form, and the side of its input, with 4 channels or as many as follow: strided convolutions take
# patches for sides of up to 16, those from 4 channels to 36 for any side.
_LAYERS = {
    "group norm": (GroupNorm(2, 1e-5), _plain_group_norm, 5),
    "layer norm": (LayerNorm(), _plain_layer_norm, 5),
    "1x1": (_POINTWISE, _plain_conv(_POINTWISE), 5),
    "strided": (_STRIDED, _plain_conv(_STRIDED), 8),
    "strided, odd": (_STRIDED, _plain_conv(_STRIDED), 7),
    "strided, largest": (_STRIDED, _plain_conv(_STRIDED), 16),
    "strided, larger": (_STRIDED, _plain_conv(_STRIDED), 18),
    "strided, padded below": (_BELOW, _plain_conv(_BELOW), 8),
    "2x2": (Conv(6), _plain_conv(Conv(6)), 2),
    "few channels in": (_WIDE, _plain_conv(_WIDE), 5),
    "few channels in, strided": (_WIDE_STRIDED, _plain_conv(_WIDE_STRIDED), 18),
    "few channels out": (_NARROW, _plain_conv(_NARROW), 5, 36),
    "few channels out, padded below": (_NARROW_BELOW, _plain_conv(_NARROW_BELOW), 5, 36),
}


@pytest.mark.parametrize("name", list(_LAYERS))
def test_results_and_derivatives_are_those_of_the_plain_form(name):
    layer, plain, side, *channels = _LAYERS[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, direction = rng.normal(size=(2, 3, side, side, *(channels or [4])))
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
        moved = jax.tree.map(jnp.cos, params)

        def modes(apply):
            def loss(params, x):
                return jnp.sum(jnp.sin(apply(params, x)))

            each = jax.vmap(jax.grad(lambda params, x: loss(params, x[None]), (0, 1)), (None, 0))
            return (
                apply(params, x),
                jax.grad(loss, (0, 1))(params, x),
                each(params, x),
                jax.jvp(apply, (params, x), (moved, direction)),
                jax.jvp(jax.grad(loss, (0, 1)), (params, x), (moved, direction)),
            )

        found = modes(lambda params, x: layer.apply({"params": params}, x))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(modes(plain)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


def test_few_channels_are_convolved_by_products_in_full_precision_alone():
    def primitives(layer, channels, dtype):
        x = jnp.zeros((2, 18, 18, channels), dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), layer.init(jax.random.key(0), x))
        return {equation.primitive.name for equation in jax.make_jaxpr(layer.apply)(params, x).eqns}

    products = {"dot_general"}
    convolution = {"conv_general_dilated"}
    for layer, channels, dtype, expected in (
        (_WIDE, 4, jnp.float32, products),
        (_WIDE, 4, jnp.bfloat16, products),
        (_WIDE, 5, jnp.float32, convolution),
        (_NARROW, 36, jnp.float32, products),
        (_NARROW, 36, jnp.bfloat16, convolution),
        (_NARROW, 35, jnp.float32, convolution),
    ):
        found = primitives(layer, channels, dtype) & (products | convolution)
        assert found == expected, (layer, channels, dtype)


def test_a_cotangent_is_written_by_a_cpu_in_reverse_mode_alone():
    x = jnp.ones(3)

    def function(x):
        return materialise_cotangent(jnp.sin(x))

    modes = {
        "forward": function,
        "forward mode": lambda x: jax.jvp(function, (x,), (x,)),
        "reverse": jax.grad(lambda x: jnp.sum(function(x))),
        "examples": jax.vmap(jax.grad(function)),
        "twice": lambda x: jax.jvp(jax.grad(lambda x: jnp.sum(jnp.square(function(x)))), (x,), (x,)),
    }
    barriers = {
        platform: {
            name: export.export(jax.jit(mode), platforms=[platform])(x)
            .mlir_module()
            .count("stablehlo.optimization_barrier")
            for name, mode in modes.items()
        }
        for platform in ("cpu", "cuda", "tpu")
    }
    assert barriers["cpu"] == {"forward": 0, "forward mode": 0, "reverse": 1, "examples": 1, "twice": 2}
    assert not any(sum(counts.values()) for counts in (barriers["cuda"], barriers["tpu"]))
    np.testing.assert_array_equal(modes["reverse"](x), jnp.cos(x))
