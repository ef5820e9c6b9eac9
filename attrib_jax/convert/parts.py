"""The parts of a pipeline that hold weights: config -> Flax module -> shapes -> parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.convert.config_files import check_values
from attrib_jax.convert.families import check_quantization, check_unet_config
from attrib_jax.convert.ldm.target import is_mark
from attrib_jax.convert.weights.files import open_weights
from attrib_jax.convert.weights.names import text_encoder_names, vae_names
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextProjectionConfig,
)
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig, empty_conditioning
from attrib_jax.models.vae import PIXEL_CLASS_NAME as PIXELS
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig, PixelAutoencoder, PixelAutoencoderConfig

# Options that the readers of the configs take beside their dataclasses' fields.
_MORE_OPTIONS: dict[type, dict[str, Any]] = {
    UNetConfig: {"_class_name": str, "num_attention_heads": int | tuple[int, ...] | None},
    AutoencoderKLConfig: {
        "_class_name": str,
        "down_block_types": tuple[str, ...] | None,
        "up_block_types": tuple[str, ...] | None,
    },
    PixelAutoencoderConfig: {"_class_name": str},
    CLIPTextConfig: {"model_type": str, "architectures": tuple[str, ...] | None},
    CLIPTextProjectionConfig: {"model_type": str, "architectures": tuple[str, ...] | None},
}


def build_module(part: str, config: Mapping[str, Any], source: str) -> Any:
    """The Flax module of a part's config.json: `unet`, `vae`, `text_encoder` or `text_encoder_2`.

    Args:
      part: name of the part.
      config: content of its config.json.
      source: what the error messages call the config, usually its file.

    Raises ValueError, naming the source, the key and its value, for another family of models, a value of a wrong type
    or out of bounds, and anything that the module would compute wrongly.
    """
    check_quantization(config, source)
    if part == "unet":
        check_unet_config(config, source)
        return UNet2DConditionModel(_read(UNetConfig, config, source))
    if part == "text_encoder":
        return CLIPTextModel(_read(CLIPTextConfig, config, source))
    if part == "text_encoder_2":
        return CLIPTextModelWithProjection(_read(CLIPTextProjectionConfig, config, source))
    if config.get("_class_name") == PIXELS:
        return PixelAutoencoder(_read(PixelAutoencoderConfig, config, source))
    vae = _read(AutoencoderKLConfig, config, source)
    if any(width % vae.norm_num_groups for width in vae.block_out_channels):
        raise ValueError(
            f"{source}: norm_num_groups is {vae.norm_num_groups}; expected a divisor of every entry of "
            f"block_out_channels={list(vae.block_out_channels)}"
        )
    return AutoencoderKL(vae)


def _read(config_class: Any, config: Mapping[str, Any], source: str) -> Any:
    check_values(config, config_class, source)
    check_values(config, _MORE_OPTIONS[config_class], source)
    try:
        return config_class.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


# Options of a scheduler_config.json that a `NoiseSchedule` reads.
_SCHEDULE_OPTIONS: dict[str, Any] = {
    "_class_name": str,
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "beta_schedule": str,
    "trained_betas": tuple[float, ...] | None,
    "rescale_betas_zero_snr": bool,
    "prediction_type": str,
    "set_alpha_to_one": bool,
    "steps_offset": int,
    "timestep_spacing": str,
    "clip_sample": bool,
    "clip_sample_range": float,
    "thresholding": bool,
}


_FLOW_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": int,
    "shift": float,
    "use_dynamic_shifting": bool,
    "base_shift": float | None,
    "max_shift": float | None,
    "base_image_seq_len": int,
    "max_image_seq_len": int,
    "shift_terminal": float | None,
    "time_shift_type": str,
    "loss_weighting": str,
}


def build_schedule(config: Mapping[str, Any], prediction_type: str | None, source: str) -> Any:
    """The noise schedule of a scheduler_config.json, with another `prediction_type` unless None.

    A `NoiseSchedule`, or the `FlowSchedule` of a flow-matching model, which predicts nothing else.

    Raises ValueError, naming the source, the key and its value, for what is not supported.
    """
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        from attrib_jax.diffusion.flow import FlowSchedule  # no other model needs it

        check_values(config, _FLOW_OPTIONS, source)
        try:
            return FlowSchedule.from_config(config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    check_values(config, _SCHEDULE_OPTIONS, source)
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    try:
        return NoiseSchedule.from_config({**config, **given})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def load_part(part: str, module: Any, path: str, dtype: Any) -> Any:
    """The parameters of a part in the diffusers naming, from a weight file or the index of its shards."""
    state = {name: tensor for name, tensor in open_weights(path).items() if not is_mark(name, tensor.shape)}
    if part == "vae":
        state = vae_names(state)
    elif part in ("text_encoder", "text_encoder_2"):
        state = text_encoder_names(state)
    return load_params(state, abstract_part_params(part, module), dtype, source=path)


def abstract_part_params(part: str, module: Any) -> Any:
    """The shapes of the parameters of `unet`, `vae`, `text_encoder` or `text_encoder_2`; no array is made."""
    functions = {"unet": abstract_unet_params, "vae": abstract_vae_params}
    functions |= dict.fromkeys(("text_encoder", "text_encoder_2"), abstract_text_params)
    return functions[part](module)


@functools.cache
def abstract_unet_params(unet: UNet2DConditionModel) -> Any:
    """The shapes of a UNet's parameters; no array is made."""
    config = unet.config
    side = 2 ** len(config.block_out_channels)
    latents = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    conditioning = jax.eval_shape(functools.partial(empty_conditioning, config, 1, 1))
    return abstract_params(unet, latents, jax.ShapeDtypeStruct((1,), jnp.int32), conditioning)


@functools.cache
def abstract_vae_params(vae: AutoencoderKL | PixelAutoencoder) -> Any:
    """The shapes of an autoencoder's parameters; no array is made."""
    side = 2 * vae.config.downscale
    return abstract_params(vae, jax.ShapeDtypeStruct((1, side, side, vae.config.in_channels), jnp.float32))


@functools.cache
def abstract_text_params(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> Any:
    """The shapes of a text encoder's parameters; no array is made."""
    return abstract_params(text_encoder, jax.ShapeDtypeStruct((1, 1), jnp.int32))
