"""Diffusion transformers and T5 against diffusers and transformers: forward, gradients by the text's keys and values.

Weights are loaded by name, so that a missing, extra or misshaped one fails.
"""

import functools
import math
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_flux
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from attrib_jax.convert.weights.names import t5_names, torch_name
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params, state_dict_of
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.models.flux import FluxConfig, FluxTransformer2DModel
from attrib_jax.models.pixart import PixArtConfig, PixArtTransformer2DModel
from attrib_jax.models.sd3 import SD3Config, SD3Transformer2DModel
from attrib_jax.models.t5 import T5Config, T5EncoderModel, relative_buckets
from tests.parity.torch_weights import randomise

TOKENS = 5
# The structure of the published models with few channels.
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "num_layers": 2,
    "in_channels": 6,
    "out_channels": 6,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 9,
}
SD35_MEDIUM = SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": [0], "num_layers": 3}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [2, 2, 4],
}
FLUX_DEV = FLUX | {"guidance_embeds": True}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "sample_size": 8,
}
PIXART_ALPHA = PIXART | {"use_additional_conditions": True, "interpolation_scale": 2}

MODELS = {
    "SD3Transformer2DModel": (SD3Config, SD3Transformer2DModel),
    "FluxTransformer2DModel": (FluxConfig, FluxTransformer2DModel),
    "PixArtTransformer2DModel": (PixArtConfig, PixArtTransformer2DModel),
}
# The keys and values of the text, in the names of diffusers.
KV = {
    "SD3Transformer2DModel": r"transformer_blocks\.\d+\.attn\.add_[kv]_proj\.(weight|bias)",
    "FluxTransformer2DModel": r"transformer_blocks\.\d+\.attn\.add_[kv]_proj\.(weight|bias)",
    "PixArtTransformer2DModel": r"transformer_blocks\.\d+\.attn2\.(to_[kv]\.weight|to_v\.bias)",
}
CASES = {
    "sd3": (SD3, (8, 8)),
    "sd3.5_medium": (SD35_MEDIUM, (6, 10)),
    "flux_schnell": (FLUX, (4, 6)),
    "flux_dev": (FLUX_DEV, (6, 4)),
    "pixart_sigma": (PIXART, (8, 8)),
    "pixart_alpha": (PIXART_ALPHA, (6, 10)),
}


def sinusoids_float64(timesteps: torch.Tensor) -> torch.Tensor:
    """The features of numbers in float64; diffusers has them in float32 only."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rms_norm_float64(norm, epsilon, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * norm.weight


def rotary_float64(x, tables, sequence_dim):
    cosines, sines = (table[None, :, None, :].double() for table in tables)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosines + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sines


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """`model` without the float32 that diffusers and transformers insist on inside."""
    for module in model.modules():
        if isinstance(module, diffusers.models.embeddings.Timesteps):
            module.forward = sinusoids_float64
        elif isinstance(module, RMSNorm):
            module.forward = functools.partial(rms_norm_float64, module, module.eps)
        elif isinstance(module, T5LayerNorm):
            module.forward = functools.partial(rms_norm_float64, module, module.variance_epsilon)
    return model.double()


def torch_model(config: dict, dtype: np.dtype) -> torch.nn.Module:
    model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    randomise(model, seed=1)
    return in_float64(model) if dtype == np.float64 else model


def draw_conditioning(rng, shapes: dict, batch: int, dtype) -> dict[str, np.ndarray]:
    drawn = {}
    for name, shape in shapes.items():
        drawn[name] = rng.normal(size=(batch, *(size or TOKENS for size in shape))).astype(dtype)
    if "mask" in drawn:
        drawn["mask"] = np.array([[1] * TOKENS, [1, 1, 1, 0, 0]])[:batch].astype(dtype)
    for name, values in (("resolution", (480, 640)), ("aspect_ratio", (0.75,)), ("guidance", 3.5)):
        if name in drawn:
            drawn[name] = np.broadcast_to(np.asarray(values, dtype), drawn[name].shape)
    return drawn


def torch_forward(model, latents: np.ndarray, timesteps: np.ndarray, conditioning: dict) -> torch.Tensor:
    """The prediction of diffusers' module, called as its pipeline does -> (B, h, w, c)."""
    given = {name: torch.tensor(array) for name, array in conditioning.items()}
    x, times = torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(timesteps).to(torch.tensor(latents).dtype)
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
        output = model(x, given["text"], times, added_cond_kwargs=sizes, encoder_attention_mask=given["mask"]).sample
        return output.chunk(2, dim=1)[0].permute(0, 2, 3, 1)
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(x, given["text"], given["pooled"], times).sample.permute(0, 2, 3, 1)
    batch, channels, height, width = x.shape
    pipeline = diffusers.FluxPipeline
    packed = pipeline._pack_latents(x, batch, channels, height, width)
    image_ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    text_ids = torch.zeros(given["text"].shape[1], 3)
    guidance = given.get("guidance")
    output = model(packed, given["text"], given["pooled"], times / 1000, image_ids, text_ids, guidance).sample
    return pipeline._unpack_latents(output, 8 * height, 8 * width, 8).permute(0, 2, 3, 1)


def relative_error(value, reference) -> float:
    reference = reference.detach().numpy() if isinstance(reference, torch.Tensor) else reference
    assert value.shape == reference.shape
    return np.abs(np.asarray(value) - reference).max() / np.abs(reference).max()


FLOAT32 = ("sd3", "sd3.5_medium", "flux_dev", "pixart_sigma")


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [*((case, np.float32, 1e-4) for case in FLOAT32), *((case, np.float64, 1e-9) for case in CASES)],
)
def test_forward_and_gradients_match_diffusers(case, dtype, tolerance, monkeypatch):
    config, (height, width) = CASES[case]
    if dtype == np.float64:
        monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotary_float64)
    model = torch_model(config, dtype)
    config_class, module_class = MODELS[config["_class_name"]]
    module = module_class(config_class.from_dict(config))
    rng = np.random.default_rng(2)
    latents = rng.normal(size=(2, height, width, module.config.latent_channels)).astype(dtype)
    target = rng.normal(size=latents.shape).astype(dtype)
    conditioning = draw_conditioning(rng, module.config.conditioning, 2, dtype)
    timesteps = np.array([981.5, 3], dtype)

    expected = torch_forward(model, latents, timesteps, conditioning)
    ((expected - torch.tensor(target)) ** 2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    def loss(selected, rest):
        prediction = module.apply({"params": merge_weights(selected, rest)}, latents, timesteps, conditioning)
        return jnp.mean((prediction - target) ** 2), prediction

    with jax.enable_x64(dtype == np.float64):
        abstract = abstract_params(module, latents, timesteps, conditioning)
        state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        params = load_params(state, abstract, dtype)
        assert {name: tensor.shape for name, tensor in state_dict_of(params).items()} == {
            name: tensor.shape for name, tensor in state.items()
        }
        selected, rest = select_weights(params, "cross-attn-kv")
        found, prediction = jax.jit(jax.grad(loss, has_aux=True))(selected, rest)
    assert prediction.dtype == dtype
    assert relative_error(prediction, expected) < tolerance
    names = {torch_name(path): path for path in flatten_names(found)}
    pattern = KV[config["_class_name"]]
    assert names.keys() == {name for name in gradients if re.fullmatch(pattern, name)}
    flat = flatten_names(found)
    for name in filter(lambda name: name.endswith("weight"), names):
        # A bias with its kernel: its gradient is a sum in which much cancels.
        both = [part for part in (name, name.replace("weight", "bias")) if part in names]
        joined = np.concatenate([np.ravel(np.transpose(flat[names[part]])) for part in both])
        expected = np.concatenate([gradients[part].numpy().ravel() for part in both])
        assert relative_error(joined, expected) < tolerance, name


@pytest.mark.parametrize("config", [SD35_MEDIUM, FLUX_DEV, PIXART_ALPHA], ids=["sd3.5", "flux", "pixart"])
def test_exported_config_is_read_back_by_both(config):
    config_class = MODELS[config["_class_name"]][0]
    exported = config_class.from_dict(config).to_dict()
    assert config_class.from_dict(exported) == config_class.from_dict(config)
    theirs = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in theirs.from_config(c).state_dict().items()} for c in (config, exported)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_t5_matches_transformers(activation, dtype):
    sizes = {"vocab_size": 30, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    config = T5Config(**sizes, feed_forward_proj=activation, relative_attention_num_buckets=8)
    theirs = transformers.T5EncoderModel(transformers.T5Config.from_dict(config.to_dict())).eval()
    randomise(theirs, seed=1)
    theirs = in_float64(theirs) if dtype == np.float64 else theirs
    ids = np.random.default_rng(3).integers(30, size=(2, 11)).astype(np.int32)
    mask = np.ones((2, 11), np.int32)
    mask[1, 6:] = 0
    module = T5EncoderModel(config)
    with jax.enable_x64(dtype == np.float64):
        state = t5_names({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
        params = load_params(state, abstract_params(module, ids, mask), dtype)
        for given in (None, mask):
            expected = theirs(torch.tensor(ids).long(), None if given is None else torch.tensor(given))[0]
            found = module.apply({"params": params}, ids, given)
            assert found.dtype == dtype
            assert relative_error(found, expected) < (1e-4 if dtype == np.float32 else 1e-9)


def test_relative_buckets_are_transformers():
    positions = torch.arange(512)
    expected = T5Attention._relative_position_bucket(positions[None] - positions[:, None], True, 32, 128)
    np.testing.assert_array_equal(relative_buckets(512, 32, 128), expected.numpy())
