"""Stable Diffusion pipelines: the diffusers folder layout <-> Flax modules, parameters, tokenizer and schedule."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.names import text_encoder_names, vae_names
from attrib_jax.convert.state_dicts import (
    abstract_params,
    load_params,
    read_safetensors,
    state_dict_of,
    write_safetensors,
)
from attrib_jax.convert.tokenizer import PromptReport, inspect_prompt, load_tokenizer, save_tokenizer, tokenize_prompts
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

_INDEX = "model_index.json"
_UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TEXT_WEIGHTS = "model.safetensors"
_SCHEDULER_CONFIG = "scheduler_config.json"
# The class names of each part in model_index.json. A scheduler of any class is read for its noise schedule.
_SUPPORTED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}


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
    vae: AutoencoderKL
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


def load_pipeline(path: str, dtype: Any = jnp.float32) -> Pipeline:
    """Reads a diffusers StableDiffusionPipeline folder with safetensors weights.

    Args:
      path: the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/.
      dtype: of the loaded parameters, whatever the files hold.

    Raises:
      FileNotFoundError: the folder, or files in it, are missing; all of them are listed.
      ValueError: a class, option or tensor that this library does not support, or a damaged file; says which.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"model folder {path!r} does not exist; give a folder in the diffusers layout")
    if not os.path.isfile(os.path.join(path, _INDEX)):
        raise FileNotFoundError(f"{path!r} has no {_INDEX}; give the top folder of a pipeline in the diffusers layout")
    index = _read_json(os.path.join(path, _INDEX))
    _check_classes(index, path)
    _check_files(path)
    scheduler = _read_json(os.path.join(path, "scheduler", _SCHEDULER_CONFIG))
    unet, unet_params = load_unet(os.path.join(path, "unet"), dtype)
    vae, vae_params = _load_vae(os.path.join(path, "vae"), dtype)
    text_encoder, text_params = _load_text_encoder(os.path.join(path, "text_encoder"), dtype)
    return Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(os.path.join(path, "tokenizer")),
        schedule=NoiseSchedule.from_config(scheduler),
        params={"unet": unet_params, "vae": vae_params, "text_encoder": text_params},
    )


def load_unet(path: str, dtype: Any = jnp.float32) -> tuple[UNet2DConditionModel, Any]:
    """Reads one diffusers UNet folder (config.json and safetensors weights) -> (module, params).

    Raises FileNotFoundError and ValueError as `load_pipeline`.
    """
    module = UNet2DConditionModel(UNetConfig.from_dict(_read_config(path)))
    return module, _load_weights(path, _UNET_WEIGHTS, abstract_unet_params(module), dtype)


def _load_vae(path: str, dtype: Any) -> tuple[AutoencoderKL, Any]:
    module = AutoencoderKL(AutoencoderKLConfig.from_dict(_read_config(path)))
    return module, _load_weights(path, _UNET_WEIGHTS, abstract_vae_params(module), dtype, vae_names)


def _load_text_encoder(path: str, dtype: Any) -> tuple[CLIPTextModel, Any]:
    module = CLIPTextModel(CLIPTextConfig.from_dict(_read_config(path)))
    return module, _load_weights(path, _TEXT_WEIGHTS, abstract_text_params(module), dtype, text_encoder_names)


@functools.cache
def abstract_unet_params(unet: UNet2DConditionModel) -> Any:
    """The shapes of a UNet's parameters; no array is made."""
    config = unet.config
    side = 2 ** len(config.block_out_channels)
    latents = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return abstract_params(unet, latents, jax.ShapeDtypeStruct((1,), jnp.int32), text)


@functools.cache
def abstract_vae_params(vae: AutoencoderKL) -> Any:
    """The shapes of an autoencoder's parameters; no array is made."""
    side = 2 * vae.config.downscale
    return abstract_params(vae, jax.ShapeDtypeStruct((1, side, side, vae.config.in_channels), jnp.float32))


@functools.cache
def abstract_text_params(text_encoder: CLIPTextModel) -> Any:
    """The shapes of a text encoder's parameters; no array is made."""
    return abstract_params(text_encoder, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def save_pipeline(pipeline: Pipeline, path: str, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a folder that `load_pipeline` and PyTorch diffusers' StableDiffusionPipeline open.

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
        if not os.path.isfile(os.path.join(path, _INDEX)):
            raise FileExistsError(f"{path} exists and is no pipeline folder (no {_INDEX}); name another folder")
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    workplace = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        fresh = os.path.join(workplace, "new")
        _write_parts(pipeline, fresh, dtype)
        if os.path.lexists(path):
            os.rename(path, os.path.join(workplace, "old"))
        os.rename(fresh, path)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _write_parts(pipeline: Pipeline, folder: str, dtype: Any) -> None:
    weights = {"unet": _UNET_WEIGHTS, "vae": _UNET_WEIGHTS, "text_encoder": _TEXT_WEIGHTS}
    for part, filename in weights.items():
        config = getattr(pipeline, part).config.to_dict()
        _write_json(config, os.path.join(folder, part, "config.json"))
        write_safetensors(state_dict_of(pipeline.params[part], dtype), os.path.join(folder, part, filename))
    save_tokenizer(pipeline.tokenizer, os.path.join(folder, "tokenizer"))
    scheduler = {"_class_name": "DDIMScheduler", **pipeline.schedule.to_config()}
    _write_json(scheduler, os.path.join(folder, "scheduler", _SCHEDULER_CONFIG))
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
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(index, os.path.join(folder, _INDEX))


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


def _check_classes(index: dict[str, Any], path: str) -> None:
    class_name = index.get("_class_name")
    if class_name != "StableDiffusionPipeline":
        raise ValueError(
            f"{path!r} is a {class_name!r}; supported: 'StableDiffusionPipeline' (the Stable Diffusion 1 and 2 family)"
        )
    for part, supported in _SUPPORTED.items():
        found = (index.get(part) or [None, None])[1]
        if found not in supported:
            raise ValueError(f"{path!r} has {part} of class {found!r}; supported: {', '.join(supported)}")


def _check_files(path: str) -> None:
    wanted = (
        ("unet", "config.json"),
        ("unet", _UNET_WEIGHTS),
        ("vae", "config.json"),
        ("vae", _UNET_WEIGHTS),
        ("text_encoder", "config.json"),
        ("text_encoder", _TEXT_WEIGHTS),
        ("scheduler", _SCHEDULER_CONFIG),
    )
    missing = ["/".join(parts) for parts in wanted if not os.path.isfile(os.path.join(path, *parts))]
    if not os.path.isdir(os.path.join(path, "tokenizer")):
        missing.append("tokenizer/")
    if missing:
        raise FileNotFoundError(f"model folder {path!r} is incomplete, it lacks: {', '.join(missing)}")


def _load_weights(
    folder: str, filename: str, abstract: Any, dtype: Any, rename: Callable[[dict], dict] = lambda names: names
) -> Any:
    path = os.path.join(folder, filename)
    return load_params(rename(read_safetensors(path)), abstract, dtype, source=path)


def _read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder!r} has no config.json; give a model folder in the diffusers layout")
    return _read_json(path)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}); copy or download it again") from error
    kind = type(content)
    if kind is not dict:
        raise ValueError(f"{path} holds a {kind.__name__}, expected a JSON object")
    return content


def _write_json(content: dict[str, Any], path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
