"""Stable Diffusion pipelines: folders and files <-> Flax modules, parameters, tokenizer and schedule."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.configs import named_config
from attrib_jax.convert.diffusers_folder import (
    INDEX,
    SCHEDULER_CONFIG,
    STEMS,
    check_folder,
    find_weights,
    read_config,
    read_json,
    write_json,
)
from attrib_jax.convert.hub import resolve_model
from attrib_jax.convert.tokenizer import PromptReport, inspect_prompt, load_tokenizer, save_tokenizer, tokenize_prompts
from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.names import text_encoder_names, vae_names
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params, state_dict_of
from attrib_jax.core.durable import new_folder
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.pixel_autoencoder import CLASS_NAME as PIXELS
from attrib_jax.models.pixel_autoencoder import PixelAutoencoder, PixelAutoencoderConfig
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A latent-diffusion model with all that it needs to read a prompt and a picture.

    Attributes:
      unet, vae, text_encoder: Flax modules; each holds its frozen `config`.
      tokenizer: a `transformers.CLIPTokenizer`.
      schedule: the `NoiseSchedule` of training.
      params: nested dicts of arrays, keyed `unet`, `vae` and `text_encoder`.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | PixelAutoencoder
    text_encoder: CLIPTextModel
    tokenizer: Any
    schedule: NoiseSchedule
    params: dict[str, Any]

    def __post_init__(self):
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
        checks = (
            ("unet cross_attention_dim", unet.cross_attention_dim, "text_encoder hidden_size", text.hidden_size),
            ("unet in_channels", unet.in_channels, "vae latent_channels", vae.latent_channels),
        )
        for left, left_value, right, right_value in checks:
            if left_value != right_value:
                raise ValueError(f"the parts do not fit: {left} is {left_value} and {right} is {right_value}")
        if len(self.tokenizer) > text.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens and the text encoder only {text.vocab_size}"
            )
        if self.tokenizer.model_max_length > text.max_position_embeddings:
            raise ValueError(
                f"the tokenizer's model_max_length is {self.tokenizer.model_max_length} and the text encoder has only "
                f"{text.max_position_embeddings} positions; set model_max_length in tokenizer_config.json"
            )


def load_pipeline(
    path: str,
    dtype: Any = jnp.float32,
    *,
    variant: str | None = None,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    unet: str | None = None,
    unet_config: str | Mapping[str, Any] | None = None,
) -> Pipeline:
    """Reads a Stable Diffusion pipeline: a diffusers folder, a Hugging Face id, or a single-file checkpoint.

    Folders of every age are read as they are: weights as safetensors or `.bin`, whole or in shards, under today's names
    and those of the published files. Tensors are read one by one. A folder's parts that the arguments replace are
    neither read nor downloaded, and may be missing.

    Args:
      path: the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/; or
        `owner/name[@revision]`, see `resolve_model`; or a file, see `load_single_file`.
      dtype: of the loaded parameters, whatever the files hold.
      variant: of the weight files, such as "fp16". None takes full precision, or `fp16` where nothing else is there.
      tokenizer: a tokenizer folder, or a pipeline folder with one, in place of the model's own.
      prediction_type: "epsilon" or "v_prediction", in place of what the scheduler's config says, `unet_config`'s too.
      unet, unet_config: another UNet and its config, as for `replace_unet`, in place of the model's own.

    Raises:
      FileNotFoundError: the model, or files in it, are missing; all of them are listed.
      ValueError: a class, option or tensor that this library does not support, or a damaged file; says which.
    """
    scheduler = None if unet is None else _scheduler_of(unet_config)
    given = {"unet": unet, "tokenizer": tokenizer, "scheduler": scheduler}
    replaced = [part for part, value in given.items() if value is not None]
    path = resolve_model(path, variant, replaced=replaced)
    if os.path.isfile(path):
        if variant is not None:
            raise ValueError(f"variant is {variant!r}, but {path} is one file; only a folder has variants")
        from attrib_jax.convert.single_file import load_single_file  # which builds on this module

        pipeline = load_single_file(path, tokenizer, prediction_type, dtype)
        return pipeline if unet is None else replace_unet(pipeline, unet, unet_config, dtype, prediction_type)
    weights = check_folder(path, variant, replaced)
    if scheduler is None:
        scheduler = read_json(os.path.join(path, "scheduler", SCHEDULER_CONFIG))
    schedule = _schedule_of(scheduler, prediction_type)
    modules = {part: _MODULES[part](read_config(os.path.join(path, part))) for part in weights}
    length = modules["text_encoder"].config.max_position_embeddings
    loaded_tokenizer = load_tokenizer(os.path.join(path, "tokenizer") if tokenizer is None else tokenizer, length)
    if unet is not None:
        modules["unet"], unet_params = load_unet(unet, unet_config, dtype)
    params = {part: _load_part(part, modules[part], weights[part], dtype) for part in weights}
    if unet is not None:
        params["unet"] = unet_params
    return Pipeline(**modules, tokenizer=loaded_tokenizer, schedule=schedule, params=params)


def load_unet(
    path: str, config: str | Mapping[str, Any] | None = None, dtype: Any = jnp.float32
) -> tuple[UNet2DConditionModel, Any]:
    """Reads one UNet -> (module, params).

    Args:
      path: a diffusers UNet folder (config.json and weights), or a file with a bare state dict.
      config: of the UNet, see `named_config`: needed for a file, and replaces a folder's config.json.
      dtype: of the loaded parameters, whatever the file holds.

    Raises FileNotFoundError and ValueError as `load_pipeline`.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"UNet {path!r} does not exist; give a UNet folder or a weight file")
    if os.path.isfile(path) and config is None:
        raise ValueError(f"{path} is a bare weight file; give its config: a name such as 'mscoco', or a json file")
    module = _MODULES["unet"](read_config(path) if config is None else named_config(config).unet)
    file = find_weights(path, STEMS["unet"]) if os.path.isdir(path) else path
    return module, _load_part("unet", module, file, dtype)


def replace_unet(
    pipeline: Pipeline,
    path: str,
    config: str | Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    prediction_type: str | None = None,
) -> Pipeline:
    """`pipeline` with another UNet, and with the noise schedule that its config brings.

    A config without a scheduler, or a UNet folder's own config.json, leaves the schedule as it is.

    Args:
      pipeline: gives the autoencoder, text encoder and tokenizer.
      path, config, dtype: of the UNet, as for `load_unet`.
      prediction_type: "epsilon" or "v_prediction", in place of what the schedule says.

    Raises FileNotFoundError and ValueError as `load_unet`; ValueError if the UNet does not fit the other parts.
    """
    unet, params = load_unet(path, config, dtype)
    scheduler, schedule = _scheduler_of(config), pipeline.schedule
    if scheduler is not None or prediction_type is not None:
        schedule = _schedule_of(schedule.to_config() if scheduler is None else scheduler, prediction_type)
    return dataclasses.replace(pipeline, unet=unet, schedule=schedule, params=pipeline.params | {"unet": params})


def _scheduler_of(config: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scheduler_config.json that a UNet's config brings."""
    return None if config is None else named_config(config).scheduler


def _schedule_of(scheduler: Mapping[str, Any], prediction_type: str | None) -> NoiseSchedule:
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    return NoiseSchedule.from_config({**scheduler, **given})


_MODULES = {
    "unet": lambda config: UNet2DConditionModel(UNetConfig.from_dict(config)),
    "vae": lambda config: (
        PixelAutoencoder(PixelAutoencoderConfig.from_dict(config))
        if config.get("_class_name") == PIXELS
        else AutoencoderKL(AutoencoderKLConfig.from_dict(config))
    ),
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
}


def _load_part(part: str, module: Any, path: str, dtype: Any) -> Any:
    state = open_weights(path)
    if part == "unet":
        return load_params(state, abstract_unet_params(module), dtype, source=path)
    if part == "vae":
        return load_params(vae_names(state), abstract_vae_params(module), dtype, source=path)
    return load_params(text_encoder_names(state), abstract_text_params(module), dtype, source=path)


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


def save_pipeline(pipeline: Pipeline, path: str, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a folder that `load_pipeline` and PyTorch diffusers' StableDiffusionPipeline open.

    One with a `PixelAutoencoder`, which diffusers does not have, is for `load_pipeline` alone.

    The folder appears only when it is complete: it is written beside its place and then renamed.

    Args:
      pipeline: what to write.
      path: the new folder.
      dtype: of the written weights; None keeps that of the parameters.
      overwrite: replace a pipeline folder that is there.

    Raises:
      FileExistsError: `path` exists and `overwrite` is off, or it is no pipeline folder.
      ValueError: a weight holds a NaN or an infinity, or overflows `dtype`.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it, or name another folder")
        if not os.path.isfile(os.path.join(path, INDEX)):
            raise FileExistsError(f"{path} exists and is no pipeline folder (no {INDEX}); name another folder")
    with new_folder(path) as fresh:
        _write_parts(pipeline, str(fresh), dtype)


def _write_parts(pipeline: Pipeline, folder: str, dtype: Any) -> None:
    for part, stem in STEMS.items():
        write_json(getattr(pipeline, part).config.to_dict(), os.path.join(folder, part, "config.json"))
        write_weights(state_dict_of(pipeline.params[part], dtype), os.path.join(folder, part, f"{stem}.safetensors"))
    save_tokenizer(pipeline.tokenizer, os.path.join(folder, "tokenizer"))
    scheduler = {"_class_name": "DDIMScheduler", **pipeline.schedule.to_config()}
    write_json(scheduler, os.path.join(folder, "scheduler", SCHEDULER_CONFIG))
    pixels = isinstance(pipeline.vae, PixelAutoencoder)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["attrib_jax", PIXELS] if pixels else ["diffusers", "AutoencoderKL"],
    }
    write_json(index, os.path.join(folder, INDEX))


def tokenize(pipeline: Pipeline, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> input_ids (B, L) int32, L the tokenizer's `model_max_length`: truncated and padded to it."""
    return tokenize_prompts(pipeline.tokenizer, prompts)


def prompt_report(pipeline: Pipeline, prompt: str) -> PromptReport:
    """Says what the tokenizer keeps of `prompt`, what it cuts, and which words it does not know whole."""
    return inspect_prompt(pipeline.tokenizer, prompt)


def latent_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the latents that a pipeline was trained on.

    Raises ValueError where the UNet's config does not give a `sample_size`.
    """
    size = pipeline.unet.config.sample_size
    if size is None:
        raise ValueError("unet/config.json has no sample_size; add the height and width of the model's latents")
    return (size, size) if isinstance(size, int) else tuple(size)


def encode_text(text_encoder: CLIPTextModel, params: Any, input_ids: jax.Array) -> jax.Array:
    """input_ids (B, L) int32 -> text states (B, L, d), as the UNet's cross-attention takes them."""
    return text_encoder.apply({"params": params}, jnp.asarray(input_ids, jnp.int32))
