"""The parts of a pipeline that hold weights: config -> Flax module -> shapes -> parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.convert.weights.files import open_weights
from attrib_jax.convert.weights.names import text_encoder_names, vae_names
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.pixel_autoencoder import CLASS_NAME as PIXELS
from attrib_jax.models.pixel_autoencoder import PixelAutoencoder, PixelAutoencoderConfig
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig


def build_module(part: str, config: Mapping[str, Any]) -> Any:
    """The Flax module of a part's config.json: `unet`, `vae` or `text_encoder`.

    Raises ValueError, naming the key and its value, for anything that the module would compute wrongly.
    """
    if part == "unet":
        return UNet2DConditionModel(UNetConfig.from_dict(config))
    if part == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    if config.get("_class_name") == PIXELS:
        return PixelAutoencoder(PixelAutoencoderConfig.from_dict(config))
    return AutoencoderKL(AutoencoderKLConfig.from_dict(config))


def load_part(part: str, module: Any, path: str, dtype: Any) -> Any:
    """The parameters of a part in the diffusers naming, from a weight file or the index of its shards."""
    state = open_weights(path)
    if part == "vae":
        state = vae_names(state)
    elif part == "text_encoder":
        state = text_encoder_names(state)
    return load_params(state, abstract_part_params(part, module), dtype, source=path)


def abstract_part_params(part: str, module: Any) -> Any:
    """The shapes of the parameters of `unet`, `vae` or `text_encoder`; no array is made."""
    functions = {"unet": abstract_unet_params, "vae": abstract_vae_params, "text_encoder": abstract_text_params}
    return functions[part](module)


@functools.cache
def abstract_unet_params(unet: UNet2DConditionModel) -> Any:
    """The shapes of a UNet's parameters; no array is made."""
    config = unet.config
    side = 2 ** len(config.block_out_channels)
    latents = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return abstract_params(unet, latents, jax.ShapeDtypeStruct((1,), jnp.int32), text)


@functools.cache
def abstract_vae_params(vae: AutoencoderKL | PixelAutoencoder) -> Any:
    """The shapes of an autoencoder's parameters; no array is made."""
    side = 2 * vae.config.downscale
    return abstract_params(vae, jax.ShapeDtypeStruct((1, side, side, vae.config.in_channels), jnp.float32))


@functools.cache
def abstract_text_params(text_encoder: CLIPTextModel) -> Any:
    """The shapes of a text encoder's parameters; no array is made."""
    return abstract_params(text_encoder, jax.ShapeDtypeStruct((1, 1), jnp.int32))
