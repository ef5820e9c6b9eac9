"""Kernels transformed once give the results of kernels, and are where it is faster."""

import jax
import numpy as np
import pytest

from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.models.predictor import predictor
from attrib_jax.models.prepared import transform_kernels
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.ops.transform_conv import TransformedKernel

jnp = jax.numpy

_CONFIG = UNetConfig(
    block_out_channels=(32, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=16,
)


@pytest.fixture(scope="module")
def model():
    unet = UNet2DConditionModel(_CONFIG)
    shapes = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1, 5, 16), jnp.float32)
    init = lambda latents, text: unet.init(jax.random.key(0), latents, jnp.zeros(1, jnp.int32), text)["params"]  # noqa: E731
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.1, size=leaf.shape), jnp.float32), jax.eval_shape(init, *shapes)
    )
    return predictor(unet), params


def _transformed(rest):
    return {name for name, leaf in flatten_names(rest).items() if isinstance(leaf, TransformedKernel)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends have convolutions of their own")
@pytest.mark.parametrize("side", [4, 8])
def test_kernels_of_large_enough_maps_are_transformed(model, side):
    predict, params = model
    selected, rest = select_weights(params, "cross-attn-kv")
    found = _transformed(transform_kernels(predict, selected, rest, (side, side, 4), (5, 16)))
    outer = {name for name in flatten_names(rest) if "/conv" in name and name.endswith("/kernel")}
    outer = {name for name in outer if flatten_names(rest)[name].shape[:2] == (3, 3)}
    strided = {name for name in outer if "downsamplers" in name}
    # At the inner level maps have half the side.
    inner = {name for name in outer if name.startswith(("down_blocks_1", "mid_block", "up_blocks_0/resnets"))}
    assert found == outer - strided - (inner if side == 4 else set())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends have convolutions of their own")
def test_results_and_gradients_stay_the_same(model):
    predict, params = model
    selected, rest = select_weights(params, "cross-attn-kv")
    rng = np.random.default_rng(1)
    latents, text = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 8, 8, 4), (3, 5, 16)))

    def losses(selected, rest):
        params = merge_weights(selected, rest)
        return jax.vmap(lambda x, t: jnp.sum(jnp.square(predict(params, x, jnp.int32(3), t))))(latents, text)

    run = jax.jit(lambda selected, rest: (losses(selected, rest), jax.jacrev(losses)(selected, rest)))
    prepared = transform_kernels(predict, selected, rest, (8, 8, 4), (5, 16))
    assert _transformed(prepared)
    for one, other in zip(*(jax.tree.leaves(run(selected, tree)) for tree in (prepared, rest)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_selected_kernels_and_small_models_stay_as_they_are(model):
    predict, params = model
    selected, rest = select_weights(params, "all")
    assert transform_kernels(predict, selected, rest, (8, 8, 4), (5, 16)) is rest
    rest = {"layer": {"kernel": jnp.ones((3, 3))}}
    scale = lambda params, x, t, text: x * params["layer"]["kernel"][0, 0]  # noqa: E731
    assert _transformed(transform_kernels(scale, {}, rest, (1, 1, 1), (1, 1))) == set()
