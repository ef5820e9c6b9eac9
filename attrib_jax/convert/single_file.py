"""Stable Diffusion checkpoints in one file, in the original latent-diffusion naming, both ways."""

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.ldm import configs as ldm_configs
from attrib_jax.convert.ldm.names import CLIP, OPEN_CLIP, UNET, VAE, check_names, pack, part_tables, unpack
from attrib_jax.convert.parts import PIXELS, abstract_part_params
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.tokenizer import load_tokenizer
from attrib_jax.convert.weights.files import open_weights, safetensors_layout, write_weights
from attrib_jax.convert.weights.state_dicts import load_params, state_dict_of
from attrib_jax.convert.weights.tensors import Tensor
from attrib_jax.convert.weights.torch_files import open_torch
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.pixel_autoencoder import PixelAutoencoder
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

_log = logging.getLogger(__name__)

_PARTS = ("unet", "vae", "text_encoder")
# Where the header of our files has what the shapes do not tell.
_METADATA_KEY = "attrib_jax_config"
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Stable Diffusion 2 has the same tensors for both predictions. The published .ckpt files are told apart by the number
# of the training step that they were saved at: 2.0 base, 2.1 base, and 2.1 (768 pixels).
_STEP_PREDICTIONS = {875_000: "epsilon", 220_000: "epsilon", 110_000: "v_prediction"}
# Keys that change no result here; a file need not tell them.
_INERT = {
    "unet": (),
    "vae": ("sample_size",),
    "text_encoder": ("projection_dim", "pad_token_id", "bos_token_id", "eos_token_id"),
}


def load_single_file(
    path: str,
    tokenizer: str | None,
    prediction_type: str | None = None,
    dtype: Any = jnp.float32,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> Pipeline:
    """Reads a Stable Diffusion 1 or 2 checkpoint in the original naming, `.ckpt` or `.safetensors`.

    The architecture is read off the tensors' shapes. The weights are the plain ones: averaged copies (`model_ema.`),
    buffers and training state are left out with a line in the log.

    Args:
      path: the file.
      tokenizer: a tokenizer's folder, or a pipeline folder with tokenizer/ in it; the file itself has none.
      prediction_type: "epsilon" or "v_prediction"; None takes "epsilon" for Stable Diffusion 1, and for 2 what the
        training step in the file tells.
      dtype: of the loaded parameters, whatever the file holds.
      config: what the shapes do not tell of a model that is none of the published ones, as entries of the json files
        of a diffusers folder: {"unet": {...}, "vae": {...}, "text_encoder": {...}, "scheduler": {...}}. A scheduler
        with a `_class_name` is taken whole. None takes what the header of a file by `save_single_file` says.

    Raises:
      FileNotFoundError: the file or the tokenizer is missing.
      ValueError: a damaged file, another family of models, tensors that are missing, unexpected or misshaped (they are
        listed), a noise schedule that is not the usual one, or a prediction type that nothing tells.
    """
    path = os.fspath(path)
    state = _with_text_model(open_weights(path))
    given = _check_config(_stored_config(path) if config is None else config)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    _check_family(shapes, path)
    tokenizer_folder = _tokenizer_folder(tokenizer, path)
    scheduler = _scheduler_config(state, prediction_type, given["scheduler"], path)
    schedule = NoiseSchedule.from_config(scheduler)
    if "alphas_cumprod" in state and not given["scheduler"]:
        _check_schedule(state["alphas_cumprod"], schedule, path)
    configs = ldm_configs.infer_configs(shapes, schedule.prediction_type, path)
    positions = (configs["text_encoder"] | given["text_encoder"])["max_position_embeddings"]
    tokenizer = load_tokenizer(tokenizer_folder, positions)
    configs["text_encoder"] |= {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    if "scale_factor" in state:
        configs["vae"]["scaling_factor"] = _number(state["scale_factor"], f"{path}: scale_factor")
    modules = _build_modules({part: configs[part] | given[part] for part in configs}, path)
    tables = part_tables(modules)
    check_names(shapes, tables, modules["text_encoder"].config.num_hidden_layers, path)
    params = {
        part: load_params(
            unpack(state, table, path), abstract_part_params(part, modules[part]), dtype, f"{path} ({part})"
        )
        for part, table in tables.items()
    }
    return Pipeline(**modules, tokenizer=tokenizer, schedule=schedule, params=params)


def save_single_file(pipeline: Pipeline, path: str, dtype: Any = None) -> None:
    """Writes one safetensors file in the original naming, tensor by tensor.

    A text encoder with the exact GELU is written under open_clip's names, as Stable Diffusion 2 has it; it then has
    only the layers that are used, 23 of the published 24. The file holds no tokenizer. What its shapes leave open is in
    its header, for `load_single_file`; another program has to be told it, so it is logged, see `uninferable_config`.

    Args:
      pipeline: what to write.
      path: the new file, replaced if it is there.
      dtype: of the written weights; None keeps that of the parameters.

    Raises:
      FileNotFoundError: the folder of `path` does not exist.
      ValueError: a weight holds a NaN or an infinity, or overflows `dtype`; or the model works on pixels, which these
        files have no place for.
    """
    tensors = {}
    for part, table in part_tables(_modules_of(pipeline)).items():
        tensors |= pack(state_dict_of(pipeline.params[part]), table)
    entries = uninferable_config(pipeline)
    prediction = {"prediction_type": pipeline.schedule.prediction_type}
    config = entries | {"scheduler": prediction | entries.get("scheduler", {})}
    write_weights(tensors, path, dtype, {_METADATA_KEY: json.dumps(config)})
    if entries:
        _log.warning("%s: other programs need these entries, which tensor shapes cannot determine: %r", path, entries)


def uninferable_config(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Config entries that the tensor shapes in `save_single_file`'s file cannot determine.

    They have the form of `config` of `load_single_file`.
    Empty for a published model, but for the `upcast_attention` of Stable Diffusion 2.1. The `prediction_type` of Stable
    Diffusion 2 is never in it.
    """
    modules = _modules_of(pipeline)
    shapes = {}
    for part, table in part_tables(modules).items():
        tensors = pack(state_dict_of(abstract_part_params(part, modules[part])), table)
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
    schedule = pipeline.schedule
    inferred = ldm_configs.infer_configs(shapes, schedule.prediction_type, "the pipeline")
    entries = {}
    for part, module in modules.items():
        defaults = {field.name: field.default for field in dataclasses.fields(module.config)}
        actual = module.config.to_dict()
        told = {key: list(x) if isinstance(x, tuple) else x for key, x in (defaults | inferred[part]).items()}
        # Null, as older files have it, means false or 0.
        differ = [key for key in told if told[key] != actual[key] and (told[key] or actual[key])]
        keys = [key for key in differ if key not in _INERT[part]]
        if keys:
            entries[part] = {key: actual[key] for key in keys}
    usual = NoiseSchedule.from_config(_SCHEDULER | {"prediction_type": schedule.prediction_type})
    may_predict_v = ldm_configs.has_open_clip(shapes)
    if not _same_schedule(schedule, usual) or (schedule.prediction_type != "epsilon" and not may_predict_v):
        entries["scheduler"] = {"_class_name": "DDIMScheduler"} | schedule.to_config()
    return entries


def untold_config(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Deprecated name of `uninferable_config`."""
    warnings.warn("untold_config is now uninferable_config", DeprecationWarning, stacklevel=2)
    return uninferable_config(pipeline)


def _stored_config(path: str) -> dict[str, dict[str, Any]] | None:
    """The config in the header of a file of ours; None for any other."""
    if not path.endswith(".safetensors"):
        return None
    metadata = safetensors_layout(path)[0]
    stored = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if stored is None:
        return None
    try:
        config = json.loads(stored)
        if not all(isinstance(entries, dict) for entries in config.values()):
            raise ValueError("a part is no object")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: the entry {_METADATA_KEY} of its header is damaged ({error}); give config={{...}}"
        ) from error
    return config


def _check_config(config: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    parts = (*_PARTS, "scheduler")
    unknown = sorted(set(config or {}) - set(parts))
    if unknown:
        raise ValueError(f"config has the parts {', '.join(unknown)}; expected some of {', '.join(parts)}")
    return {part: dict((config or {}).get(part, {})) for part in parts}


def _with_text_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives Stable Diffusion 1's text encoder the `text_model.` level that files of transformers 5 leave out."""
    bare = tuple(f"{CLIP}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
    prefix = f"{CLIP}text_model."
    return {prefix + name.removeprefix(CLIP) if name.startswith(bare) else name: x for name, x in state.items()}


def _check_family(shapes: ldm_configs.Shapes, source: str) -> None:
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in shapes)

    supported = "supported: Stable Diffusion 1 and 2 checkpoints in the original latent-diffusion naming"
    if has("conditioner.", "text_encoders."):
        raise ValueError(f"{source} has the text encoders of Stable Diffusion XL or 3; {supported}")
    parts = {"UNet": (UNET,), "autoencoder": (VAE,), "text encoder": (f"{CLIP}text_model.", OPEN_CLIP)}
    absent = [f"{part} ({' or '.join(names)}*)" for part, names in parts.items() if not has(*names)]
    if absent:
        names = ", ".join(sorted(shapes)[:3]) or "none"
        raise ValueError(f"{source} has no {', no '.join(absent)}; {supported}. Its first tensors: {names}")


def _tokenizer_folder(tokenizer: str | None, source: str) -> str:
    if tokenizer is None:
        raise ValueError(
            f"{source} holds no tokenizer: give tokenizer=FOLDER, a tokenizer's folder or a pipeline folder of the "
            "same family with tokenizer/ in it"
        )
    folder = os.fspath(tokenizer)
    inner = os.path.join(folder, "tokenizer")
    return inner if os.path.isdir(inner) else folder


def _scheduler_config(
    state: Mapping[str, Tensor], prediction_type: str | None, given: dict[str, Any], source: str
) -> dict[str, Any]:
    scheduler = given if "_class_name" in given else _SCHEDULER | given
    prediction_type = prediction_type or scheduler.get("prediction_type")
    if prediction_type is None and ldm_configs.has_open_clip(state):
        step = _training_step(state, source)
        if step not in _STEP_PREDICTIONS:
            raise ValueError(
                f"{source} is of the Stable Diffusion 2 family and does not tell what it predicts (training step: "
                f"{step}); give prediction_type='epsilon' (the 512 pixel base models) or 'v_prediction' (768 pixels)"
            )
        prediction_type = _STEP_PREDICTIONS[step]
    return scheduler | {"prediction_type": prediction_type or "epsilon"}


def _training_step(state: Mapping[str, Tensor], path: str) -> float | None:
    if "global_step" in state:
        return _number(state["global_step"], f"{path}: global_step")
    with open(path, "rb") as file:
        is_torch = file.read(4) == b"PK\x03\x04"
    return open_torch(path)[1].get("global_step") if is_torch else None


def _number(tensor: Tensor, name: str) -> float:
    if np.prod(tensor.shape) != 1:
        raise ValueError(f"{name} has shape {tensor.shape}, expected one number")
    return float(np.asarray(tensor).reshape(()))


def _check_schedule(stored: Tensor, schedule: NoiseSchedule, source: str) -> None:
    expected = np.asarray(schedule.alphas_cumprod)
    # The tolerance is that of a buffer stored in half precision.
    if stored.shape != expected.shape or not np.allclose(np.asarray(stored, np.float32), expected, rtol=0, atol=1e-3):
        raise ValueError(
            f"{source} was trained with another noise schedule than Stable Diffusion's: its alphas_cumprod differ; "
            "give its scheduler_config.json entries as config={'scheduler': {...}}"
        )


def _same_schedule(left: NoiseSchedule, right: NoiseSchedule) -> bool:
    names = [field.name for field in dataclasses.fields(left) if field.name != "config_json"]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def _build_modules(configs: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    try:
        for part, key in (("unet", "attention_head_dim"), ("text_encoder", "num_attention_heads")):
            if configs[part][key] is None and configs[part].get("num_attention_heads") is None:
                raise ValueError(f"the shapes of the {part} do not tell its {key}, the number of heads")
        vae = AutoencoderKLConfig.from_dict(configs["vae"])
        if any(width % vae.norm_num_groups for width in vae.block_out_channels):
            raise ValueError(
                f"the vae's block_out_channels={vae.block_out_channels} are no multiples of norm_num_groups="
                f"{vae.norm_num_groups}"
            )
        unet = UNetConfig.from_dict(configs["unet"])
        text = CLIPTextConfig.from_dict(configs["text_encoder"])
    except ValueError as error:
        raise ValueError(
            f"{source} is none of the published models: {error}; give what its shapes do not tell as "
            "config={'unet': {...}, 'vae': {...}, 'text_encoder': {...}}, with the keys of the diffusers config.json"
        ) from error
    return {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae), "text_encoder": CLIPTextModel(text)}


def _modules_of(pipeline: Pipeline) -> dict[str, Any]:
    if isinstance(pipeline.vae, PixelAutoencoder):
        raise ValueError(
            f"the pipeline's vae is a {PIXELS}: a model that works on pixels cannot be a single file; give a folder as "
            "output"
        )
    return {part: getattr(pipeline, part) for part in _PARTS}
