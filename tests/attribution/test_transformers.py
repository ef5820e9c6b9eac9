"""Losses, curvature and query gradients of diffusion transformers: layers' inputs, and what differentiates them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.unlearn import query_draws, query_gradient
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.curvature import fisher_ekfac
from attrib_jax.curvature.ekfac import linear_layers
from attrib_jax.diffusion.flow import FlowSchedule
from attrib_jax.diffusion.losses import denoising_loss, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.flux import FluxConfig, FluxTransformer2DModel
from attrib_jax.models.pixart import PixArtConfig, PixArtTransformer2DModel
from attrib_jax.models.predictor import predictor
from attrib_jax.models.sd3 import SD3Config, SD3Transformer2DModel

HEADS = {"num_attention_heads": 2, "num_layers": 2}
MODULES = {
    "sd3": SD3Transformer2DModel(
        SD3Config(
            **HEADS,
            sample_size=4,
            attention_head_dim=8,
            in_channels=3,
            out_channels=3,
            joint_attention_dim=6,
            caption_projection_dim=16,
            pooled_projection_dim=5,
            pos_embed_max_size=4,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    ),
    "flux": FluxTransformer2DModel(
        FluxConfig(
            **HEADS,
            num_single_layers=1,
            attention_head_dim=8,
            in_channels=12,
            joint_attention_dim=6,
            pooled_projection_dim=5,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        )
    ),
    "pixart": PixArtTransformer2DModel(
        PixArtConfig(
            **HEADS,
            attention_head_dim=6,
            in_channels=3,
            out_channels=6,
            cross_attention_dim=12,
            caption_channels=6,
            sample_size=4,
        )
    ),
}
TOKENS = 5


def schedule_of(name):
    return NoiseSchedule.from_config({}) if name == "pixart" else FlowSchedule.from_config({})


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def conditioning_of(module, rng, count):
    drawn = {
        name: rng.normal(size=(count, *(size or TOKENS for size in shape)))
        for name, shape in module.config.conditioning.items()
    }
    if "mask" in drawn:
        drawn["mask"] = np.tile([1.0, 1, 1, 0, 0], (count, 1))
    return drawn


@functools.cache
def problem(name):
    """Predictor, parameters, and four examples as dicts of latents, conditioning, noise and timestep."""
    module, rng = MODULES[name], np.random.default_rng(0)
    channels = module.config.latent_channels
    batch = {
        "latents": rng.normal(size=(4, 4, 6, channels)) if name != "sd3" else rng.normal(size=(4, 4, 4, channels)),
        "conditioning": conditioning_of(module, rng, 4),
        "timestep": np.array([10, 300, 600, 950]),
    }
    batch["noise"] = rng.normal(size=batch["latents"].shape)
    inputs = batch["latents"][:1], batch["timestep"][:1], jax.tree.map(lambda leaf: leaf[:1], batch["conditioning"])
    layout = flatten_names(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    drawn = {
        path: rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        if leaf.ndim > 1
        else rng.normal(size=leaf.shape)
        for path, leaf in layout.items()
    }
    return predictor(module), unflatten_names(drawn), batch


def example_loss(name, selected, rest, example):
    predict = problem(name)[0]
    return denoising_loss(
        predict,
        merge_weights(selected, rest),
        schedule_of(name),
        example["latents"],
        example["conditioning"],
        example["noise"][None],
        example["timestep"][None],
    )


@pytest.mark.parametrize("name", MODULES)
def test_ekfac_has_an_input_factor_for_each_array_that_layers_read(name):
    _, params, batch = problem(name)
    selected, rest = select_weights(params, "cross-attn-kv")
    loss_fn = functools.partial(example_loss, name)
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    inputs = {layer.name: layer.input for layer in linear_layers(loss_fn, selected, rest, example)}
    layer = "transformer_blocks_{}/" + ("attn2/to_{}/kernel" if name == "pixart" else "attn/add_{}_proj/kernel")
    blocks = [{inputs[layer.format(block, kind)] for kind in "kv"} for block in range(2)]
    assert len(inputs) == 4
    # PixArt's text is one array for all blocks; elsewhere it changes from block to block.
    assert [len(block) for block in blocks] == [1, 1]
    assert len(blocks[0] | blocks[1]) == (1 if name == "pixart" else 2)

    # Rotations keep the sum of squares: of each kernel's gradients in its eigenbases, and in its own.
    curvature = fisher_ekfac(loss_fn, selected, rest, batch)
    gradients = jax.jit(jax.vmap(jax.grad(loss_fn), (None, None, 0)))(selected, rest, batch)
    eigenvalues = curvature.eigenvalues.to_flat()
    for path, gradient in flatten_names(gradients).items():
        squares = np.mean(np.square(gradient), axis=0)
        np.testing.assert_allclose(np.sum(eigenvalues[path]), np.sum(squares), rtol=1e-6)
        assert np.all(squares > 0), path


@pytest.mark.parametrize("name", MODULES)
def test_the_query_gradient_is_that_of_its_mean_loss(name):
    predict, params, batch = problem(name)
    selected, rest = select_weights(params, "cross-attn-kv")
    latents, text = batch["latents"][0], jax.tree.map(lambda leaf: leaf[0], batch["conditioning"])
    key, schedule = purpose_key(0, "query"), schedule_of(name)
    found = jax.jit(functools.partial(query_gradient, predict, draws=6, tile=4))(
        schedule, selected, rest, latents, text, key
    )
    timesteps, noise = query_draws(key, jnp.arange(6), 1000, latents.shape)

    def loss(selected):
        return denoising_loss(predict, merge_weights(selected, rest), schedule, latents, text, noise, timesteps)

    expected_loss, expected = jax.jit(jax.value_and_grad(loss))(selected)
    np.testing.assert_allclose(found.loss, expected_loss, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), found.gradient, expected)


@pytest.mark.parametrize("name", MODULES)
def test_one_text_for_all_timesteps_is_a_text_for_each(name):
    predict, params, batch = problem(name)
    latents, text = batch["latents"][0], jax.tree.map(lambda leaf: leaf[0], batch["conditioning"])
    schedule, noise, timesteps = schedule_of(name), batch["noise"], batch["timestep"]

    def loss(noise, timestep):
        return denoising_loss(predict, params, schedule, latents, text, noise[None], timestep[None])

    both = jax.jit(lambda *draws: (denoising_losses(predict, params, schedule, latents, text, *draws), each(*draws)))
    each = jax.vmap(loss)
    np.testing.assert_allclose(*both(noise, timesteps), rtol=1e-9)


def test_padding_of_a_masked_text_changes_nothing():
    predict, params, batch = problem("pixart")
    text = jax.tree.map(lambda leaf: leaf[0], batch["conditioning"])
    changed = {**text, "text": text["text"] + 100 * (1 - text["mask"])[:, None]}
    unmasked = {**text, "mask": np.ones(TOKENS)}
    found = jax.jit(jax.vmap(predict, (None, None, None, 0)))(
        params, batch["latents"][0], 500, jax.tree.map(lambda *leaves: np.stack(leaves), text, changed, unmasked)
    )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("sd3", {"pooled": np.zeros((1, 4))}, r"'pooled' has shape \(1, 4\): expected \(B, 5\)"),
        ("flux", {"text": np.zeros((3, 5, 6))}, r"'text' has shape \(3, 5, 6\): expected \(B, L, 6\), with B = 1 or 2"),
        ("pixart", {"mask": np.zeros((1, 4))}, r"'mask' has shape \(1, 4\): expected \(B, L\)"),
        ("flux", {"guidance": None}, r"entries \['pooled', 'text'\]; expected \['guidance', 'pooled', 'text'\]"),
    ],
)
def test_misshaped_conditioning_is_named(name, change, named):
    predict, params, batch = problem(name)
    conditioning = {key: leaf[:1] for key, leaf in batch["conditioning"].items()} | change
    conditioning = {key: leaf for key, leaf in conditioning.items() if leaf is not None}
    with pytest.raises(ValueError, match=named):
        predict.batched(params, batch["latents"][:2], batch["timestep"][:2], conditioning)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SD3Config(qk_norm="layer_norm", caption_projection_dim=1152), "qk_norm='layer_norm'"),
        (lambda: SD3Config(caption_projection_dim=1024), "caption_projection_dim=1024"),
        (lambda: SD3Config(dual_attention_layers=(18,)), r"dual_attention_layers has \[18\]; num_layers is 18"),
        (lambda: FluxConfig(axes_dims_rope=(16, 56)), r"axes_dims_rope=\[16, 56\]"),
        (lambda: FluxConfig(in_channels=384, out_channels=64), "out_channels=64, expected 384"),
        (lambda: FluxConfig.from_dict({"_class_name": "Other"}), "_class_name='Other'"),
        (lambda: PixArtConfig(cross_attention_dim=4096), "cross_attention_dim=4096"),
        (lambda: PixArtConfig.from_dict({"norm_type": "ada_norm"}), "norm_type='ada_norm'"),
    ],
)
def test_unsupported_configs_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
