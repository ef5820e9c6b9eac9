"""Stable Diffusion checkpoints in one file, in the naming of the original code, both ways."""

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.diffusers_folder import load_given_tokenizers
from attrib_jax.convert.families import check_tensors
from attrib_jax.convert.ldm import configs as ldm_configs
from attrib_jax.convert.ldm.names import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
    check_names,
    pack,
    part_tables,
    unpack,
)
from attrib_jax.convert.ldm.target import TARGET_OPTIONS, Claim, is_mark, merge_claims, read_claims, read_metadata
from attrib_jax.convert.ldm.transformers import transformer_kind
from attrib_jax.convert.parts import PIXELS, abstract_part_params, build_module, build_schedule
from attrib_jax.convert.pipeline import Pipeline, check_parts, require_unet
from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.state_dicts import load_params, state_dict_of
from attrib_jax.convert.weights.tensors import Tensor
from attrib_jax.convert.weights.torch_files import open_torch
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.vae import PixelAutoencoder

_log = logging.getLogger(__name__)

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# The key of the header of our files with the entries that tensor shapes cannot determine.
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
_STEP_PREDICTIONS: dict[float, str] = {875_000: "epsilon", 220_000: "epsilon", 110_000: "v_prediction"}
_GIVE_CONFIG = (
    "give the entries that tensor shapes cannot determine as config of load_single_file, or in a json file as "
    "model_config (--model_config): {'unet': {...}, 'vae': {...}, 'text_encoder': {...}, 'scheduler': {...}} with the "
    "keys of diffusers' config files"
)
# Keys that change no result here; a file need not hold them.
_INERT = {
    "unet": (),
    "vae": ("sample_size",),
    "text_encoder": ("projection_dim", "pad_token_id", "bos_token_id", "eos_token_id"),
    "text_encoder_2": ("pad_token_id", "bos_token_id", "eos_token_id"),
}


def load_single_file(
    path: str,
    tokenizer: str | None,
    prediction_type: str | None = None,
    dtype: Any = jnp.float32,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> Pipeline:
    """Reads a Stable Diffusion 1, 2, XL or 3 checkpoint in the original naming, `.ckpt` or `.safetensors`.

    The architecture is read off the tensors' shapes. The weights are the plain ones: averaged copies (`model_ema.`),
    buffers and training state are left out with a line in the log.

    Args:
      path: the file.
      tokenizer: a tokenizer's folder, or a pipeline folder with tokenizer/ in it; the file itself has none. The second
        one of Stable Diffusion XL is read from tokenizer_2/ there, or made of the first, see `load_given_tokenizers`.
      prediction_type: "epsilon" or "v_prediction". None takes what the file says: its header, marks, or a yaml beside
        it; else "epsilon" for Stable Diffusion 1, and for 2 what follows from the training step in the file.
      dtype: dtype of the loaded parameters, whatever the file holds.
      config: entries that tensor shapes cannot determine, for a model that is none of the published ones, with the keys
        of a diffusers folder's json files: {"unet": {...}, "vae": {...}, "text_encoder": {...}, "scheduler": {...}}. A
        scheduler with a `_class_name` is taken whole. None takes what the header of a file by `save_single_file` says.

    Raises:
      FileNotFoundError: the file or the tokenizer is missing.
      ValueError: a damaged file, another family of models, tensors that are missing, unexpected or misshaped (they are
        listed), a noise schedule that is not the usual one, a prediction type that nothing says, or two places that say
        different things.
    """
    path = os.fspath(path)
    tensors = open_weights(path)
    if transformer_kind(tensors) is not None:
        from attrib_jax.convert.ldm.transformer_file import load_transformer_file  # no other model needs it

        if prediction_type is not None:
            raise ValueError(f"prediction_type is given, but {path} is a model with a transformer, which has its own")
        return load_transformer_file(path, tensors, tokenizer, dtype, config)
    state = _with_text_model(tensors)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    # What the file says of itself, each with the place that says it; all places must agree.
    claims = read_claims(path, shapes)
    for name in [name for name, shape in shapes.items() if is_mark(name, shape)]:
        del state[name], shapes[name]
    stored = (_stored_config(path) if config is None else None) or {}
    pad_tokens = {part: stored.pop(part, {}).get("pad_token") for part in ("tokenizer", "tokenizer_2")}
    zeros = stored.pop("pipeline", {}).get("force_zeros_for_empty_prompt", True)
    given = _check_config(stored if config is None else config)
    _check_family(shapes, path)
    if prediction_type is not None:
        claims.append(Claim("prediction_type", prediction_type, "prediction_type (--prediction_type)"))
    if "scale_factor" in state:
        factor = _number(state["scale_factor"], f"{path}: scale_factor")
        claims.append(Claim("scaling_factor", factor, f"scale_factor in {path}"))
    where = f"the entry {_METADATA_KEY} in the header of {path}" if config is None else "config"
    claims += [Claim(option, value, where) for option, value in given["scheduler"].items() if option in TARGET_OPTIONS]
    said = merge_claims(claims)

    if tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizer: give tokenizer=FOLDER, a tokenizer's folder or a pipeline folder of the same "
            "family with tokenizer/ in it"
        )
    schedule = _schedule(state, said, given["scheduler"], path)
    configs = ldm_configs.infer_configs(shapes, schedule.prediction_type, path)
    if "scaling_factor" in said:
        configs["vae"]["scaling_factor"] = said["scaling_factor"]
    modules = _build_modules({part: configs[part] | given[part] for part in configs}, path)
    tokenizers = load_given_tokenizers(os.fspath(tokenizer), modules, pad_tokens)
    for part, tokens in tokenizers.items():
        encoder = part.replace("tokenizer", "text_encoder")
        ids = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        ids |= {name: given[encoder][name] for name in ids.keys() & given[encoder].keys()}
        modules[encoder] = modules[encoder].clone(config=dataclasses.replace(modules[encoder].config, **ids))
    check_parts(**modules, **tokenizers, whole=True)
    tables = part_tables(modules)
    check_names(shapes, tables, modules["text_encoder"].config.num_hidden_layers, path)
    params = {
        part: load_params(
            unpack(state, table, path), abstract_part_params(part, modules[part]), dtype, f"{path} ({part})"
        )
        for part, table in tables.items()
    }
    zeros = bool(zeros) and "text_encoder_2" in modules
    return Pipeline(**modules, **tokenizers, schedule=schedule, params=params, zeros_for_empty_prompt=zeros)


def save_single_file(pipeline: Pipeline, path: str | os.PathLike, dtype: Any = None) -> None:
    """Writes one safetensors file in the original naming, tensor by tensor.

    A text encoder with the exact GELU is written under open_clip's names, as Stable Diffusion 2 has it; it then has
    only the layers that are used, 23 of the published 24. The file holds no tokenizer. What its shapes leave open is in
    its header, for `load_single_file`; another program has to be told it, so it is logged, see `uninferable_config`.

    Args:
      pipeline: what to write.
      path: the new file, replaced if it is there.
      dtype: dtype of the written weights; None keeps that of the parameters.

    Raises:
      FileNotFoundError: the folder of `path` does not exist.
      ValueError: a weight holds a NaN or an infinity, or overflows `dtype`; or the model works on pixels, which these
        files have no place for.
    """
    require_unet(pipeline, "a single file in the original naming")
    tensors = {}
    for part, table in part_tables(_modules_of(pipeline)).items():
        tensors |= pack(state_dict_of(pipeline.params[part]), table)
    entries = uninferable_config(pipeline)
    prediction = {"prediction_type": pipeline.schedule.prediction_type}
    config = entries | {"scheduler": prediction | entries.get("scheduler", {})}
    config["tokenizer"] = {"pad_token": pipeline.tokenizer.pad_token}
    if pipeline.tokenizer_2 is not None:
        config["tokenizer_2"] = {"pad_token": pipeline.tokenizer_2.pad_token}
        config["pipeline"] = {"force_zeros_for_empty_prompt": pipeline.zeros_for_empty_prompt}
    # ModelSpec's name of the target, for other programs.
    short = {"v_prediction": "v"}.get(pipeline.schedule.prediction_type, pipeline.schedule.prediction_type)
    metadata = {_METADATA_KEY: json.dumps(config), "modelspec.prediction_type": short}
    write_weights(tensors, path, dtype, metadata)
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
        differ = [key for key in told if told[key] != actual.get(key) and (told[key] or actual.get(key))]
        keys = [key for key in differ if key not in _INERT[part]]
        if keys:
            entries[part] = {key: actual.get(key) for key in keys}
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
    stored = read_metadata(path).get(_METADATA_KEY)
    if stored is None:
        return None
    try:
        config = json.loads(stored)
        if not all(isinstance(entries, dict) for entries in config.values()):
            raise ValueError("a part is not an object")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: the entry {_METADATA_KEY} of its header is damaged ({error}); {_GIVE_CONFIG}"
        ) from error
    return config


def _check_config(config: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    parts = (*_PARTS, "scheduler")
    unknown = sorted(set(config or {}) - set(parts))
    if unknown:
        raise ValueError(f"config has the parts {', '.join(unknown)}; expected some of {', '.join(parts)}")
    wrong = sorted(part for part, entries in (config or {}).items() if not isinstance(entries, Mapping))
    if wrong:
        raise ValueError(f"config has {wrong[0]}={config[wrong[0]]!r}; expected entries of a config.json")
    return {part: dict((config or {}).get(part, {})) for part in parts}


def _with_text_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives a CLIP text encoder the `text_model.` level that files of transformers 5 leave out."""
    renamed = dict(state)
    for encoder in (CLIP, XL_CLIP):
        bare = tuple(f"{encoder}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
        prefix = f"{encoder}text_model."
        renamed = {prefix + n.removeprefix(encoder) if n.startswith(bare) else n: x for n, x in renamed.items()}
    return renamed


def _check_family(shapes: ldm_configs.Shapes, source: str) -> None:
    check_tensors(shapes, source)
    parts = {"UNet": (UNET,), "autoencoder": (VAE,), "text encoder": (f"{CLIP}text_model.", OPEN_CLIP)}
    if any(name.startswith("conditioner.") for name in shapes):
        parts |= {"text encoder": (f"{XL_CLIP}text_model.",), "second text encoder": (XL_OPEN_CLIP,)}
    absent = [
        f"{part} ({' or '.join(names)}*)"
        for part, names in parts.items()
        if not any(name.startswith(names) for name in shapes)
    ]
    if absent:
        names = ", ".join(sorted(shapes)[:3]) or "none"
        raise ValueError(
            f"{source} has no {', no '.join(absent)}; supported: Stable Diffusion 1, 2 and XL checkpoints in the "
            f"original naming. Its first tensors: {names}"
        )


def _schedule(
    state: Mapping[str, Tensor], said: Mapping[str, Any], given: Mapping[str, Any], source: str
) -> NoiseSchedule:
    """The noise schedule of what the file says, and of `given` entries of a scheduler_config.json."""
    scheduler = dict(given) if "_class_name" in given else {**_SCHEDULER, **given}
    scheduler |= {option: value for option, value in said.items() if option in TARGET_OPTIONS}
    stored = state.get("alphas_cumprod")
    stored = None if stored is None or given else np.asarray(stored, np.float32)
    if scheduler.get("rescale_betas_zero_snr") is None and stored is not None:
        # Trainers that rescale the schedule store the rescaled buffer; without a mark it is the only sign.
        rescaled = NoiseSchedule.from_config(scheduler | {"rescale_betas_zero_snr": True})
        if _fits_schedule(stored, rescaled):
            scheduler["rescale_betas_zero_snr"] = True
    if scheduler.get("rescale_betas_zero_snr"):
        # The last timestep is pure noise, and a sampler must start there.
        scheduler.setdefault("timestep_spacing", "trailing")
    if scheduler.get("prediction_type") is None:
        scheduler["prediction_type"] = _infer_prediction(state, bool(scheduler.get("rescale_betas_zero_snr")), source)
    schedule = build_schedule(scheduler, None, source)
    if stored is not None and not _fits_schedule(stored, schedule):
        usual = NoiseSchedule.from_config(scheduler | {"rescale_betas_zero_snr": False})
        if not (scheduler.get("rescale_betas_zero_snr") and _fits_schedule(stored, usual)):
            raise ValueError(
                f"{source} was trained with another noise schedule than Stable Diffusion's: its alphas_cumprod differ; "
                f"{_GIVE_CONFIG}, with its scheduler_config.json as the scheduler"
            )
        _log.warning(
            "%s: its alphas_cumprod are not those of zero terminal SNR, which is taken as it is marked", source
        )
    return schedule


def _infer_prediction(state: Mapping[str, Tensor], has_zero_snr: bool, source: str) -> str:
    """What a file that does not say it predicts."""
    step = None
    if not has_zero_snr:
        if not ldm_configs.has_open_clip(state):
            return "epsilon"
        step = _training_step(state, source)
        if step in _STEP_PREDICTIONS:
            return _STEP_PREDICTIONS[step]
    kind = "has zero terminal SNR" if has_zero_snr else "is of the Stable Diffusion 2 family"
    raise ValueError(
        f"{source} {kind} and does not say what it predicts (training step: {step}); give prediction_type "
        "(--prediction_type): 'epsilon' (the 512 pixel base models of Stable Diffusion 2) or 'v_prediction' (768 "
        "pixels, and most models with zero terminal SNR)"
    )


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


def _fits_schedule(stored: np.ndarray, schedule: NoiseSchedule) -> bool:
    expected = np.asarray(schedule.alphas_cumprod)
    # The tolerance is that of a buffer stored in half precision.
    return stored.shape == expected.shape and np.allclose(stored, expected, rtol=0, atol=1e-3)


def _same_schedule(left: NoiseSchedule, right: NoiseSchedule) -> bool:
    names = [field.name for field in dataclasses.fields(left) if field.name != "config_json"]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def _build_modules(configs: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    try:
        heads = {"unet": "attention_head_dim"} | dict.fromkeys(
            ("text_encoder", "text_encoder_2"), "num_attention_heads"
        )
        for part, key in heads.items():
            if part in configs and configs[part][key] is None and configs[part].get("num_attention_heads") is None:
                raise ValueError(f"the shapes of the {part} cannot determine its {key}, the number of heads")
        return {part: build_module(part, config, f"{source} ({part})") for part, config in configs.items()}
    except ValueError as error:
        raise ValueError(f"{source} is none of the published models: {error}; {_GIVE_CONFIG}") from error


def _modules_of(pipeline: Pipeline) -> dict[str, Any]:
    if isinstance(pipeline.vae, PixelAutoencoder):
        raise ValueError(
            f"the pipeline's vae is a {PIXELS}: a model that works on pixels cannot be a single file; give a folder as "
            "output"
        )
    return {part: getattr(pipeline, part) for part in _PARTS if getattr(pipeline, part) is not None}
