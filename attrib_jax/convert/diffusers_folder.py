"""Model folders in the diffusers layout, read and written: which files they hold, and which of them to read."""

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from attrib_jax.convert.config_files import read_config, read_json, write_json
from attrib_jax.convert.families import PIPELINE, TRANSFORMER_PIPELINES, XL_PIPELINE, check_class, refusal
from attrib_jax.convert.ldm.target import TARGET_OPTIONS, Claim, merge_claims, read_claims
from attrib_jax.convert.parts import PIXELS, build_module, build_schedule, load_part
from attrib_jax.convert.pipeline import Pipeline, check_parts
from attrib_jax.convert.tokenizer import SECOND_PADDING, check_padding, load_tokenizer, save_tokenizer
from attrib_jax.convert.weights.files import choose_weights, find_weights, list_files, open_weights, write_weights
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.core.durable import new_folder
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.unet import UNet2DConditionModel
from attrib_jax.models.vae import PixelAutoencoder

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
# The parts with weights, and how their weight files' names start; a model need not have the last.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_SECOND = "text_encoder_2"


# The class names of each part in model_index.json. A scheduler of any class is read for its noise schedule; a safety
# checker, feature extractor and image encoder do not take part in training or attribution.
_SUPPORTED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "PixelAutoencoder"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_SUPPORTED_XL = _SUPPORTED | {
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": _SUPPORTED["tokenizer"],
}


def check_folder(
    path: str, variant: str | None = None, replaced: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks that a pipeline folder is of a supported family and complete -> module and weight file of each part.

    Args:
      path: the folder.
      variant: variant of the weight files, as for `choose_weights`.
      replaced: parts, as the folder calls them, that another one stands in for: they are left out of the checks.

    Raises:
      FileNotFoundError: files are missing (all are listed), or the variant is.
      ValueError: see `check_configs`.
    """
    modules = check_configs(path, replaced)
    parts = parts_of(read_json(os.path.join(path, INDEX)))
    names = {part: list_files(os.path.join(path, part)) for part in STEMS if part in parts and part not in replaced}
    chosen = choose_weights(names, variant, f"model folder {path!r}")
    missing = []
    for part, files in names.items():
        missing += [] if "config.json" in files else [f"{part}/config.json"]
        missing += [] if chosen[part] else [f"{part}/{STEMS[part]}.safetensors"]
    if "scheduler" not in replaced and SCHEDULER_CONFIG not in list_files(os.path.join(path, "scheduler")):
        missing.append(f"scheduler/{SCHEDULER_CONFIG}")
    tokenizers = [part for part in parts if part.startswith("tokenizer") and part not in replaced]
    missing += [f"{part}/" for part in tokenizers if not os.path.isdir(os.path.join(path, part))]
    if missing:
        raise FileNotFoundError(f"model folder {path!r} is incomplete, it lacks: {', '.join(missing)}")
    return modules, {part: os.path.join(path, part, name) for part, name in chosen.items() if name}


def parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a model with this model_index.json has, the scheduler left out."""
    return tuple(_SUPPORTED_XL if index.get("_class_name") == XL_PIPELINE else _SUPPORTED)


def check_configs(path: str, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Checks a pipeline folder's model_index.json and configs, as far as they are there -> part -> Flax module.

    No weight file has to be there: a download starts with what is checked here.

    Args:
      path: the folder.
      replaced: parts, as the folder calls them, that another one stands in for: they are left out of the checks.

    Raises:
      FileNotFoundError: there is no model_index.json.
      ValueError: it names a pipeline or part of another class, or a config has a value that is not supported; says
        what the model is, or which file, key and value.
    """
    index_file = os.path.join(path, INDEX)
    if not os.path.isfile(index_file):
        config_file = os.path.join(path, "config.json")
        if os.path.isfile(config_file):
            config = read_json(config_file)
            name = config.get("_class_name") or config.get("model_type")
            if name in _SUPPORTED["unet"]:
                raise ValueError(
                    f"model {path!r} is a UNet alone: give it as unet (--unet), and a whole model, such as the folder "
                    "above it, as model (--model)"
                )
            check_class(name, (PIPELINE,), f"model {path!r}")
        raise FileNotFoundError(f"{path!r} has no {INDEX}; give the top folder of a pipeline in the diffusers layout")
    index = read_json(index_file)
    is_refiner = index.get("_class_name") == "StableDiffusionXLImg2ImgPipeline" and index.get("text_encoder") in (
        None,
        [None, None],
    )
    if is_refiner:
        raise refusal(f"model {path!r}", "the refiner of Stable Diffusion XL", "give the base model that it refines")
    if index.get("_class_name") in TRANSFORMER_PIPELINES:
        from attrib_jax.convert.transformer_folder import check_transformer_folder  # no other model needs it

        return check_transformer_folder(path, index)[0]
    check_class(index.get("_class_name"), (PIPELINE, XL_PIPELINE), f"model {path!r}")
    is_xl = index["_class_name"] == XL_PIPELINE
    if is_xl and index.get("text_encoder") in (None, [None, None]):
        raise refusal(f"model {path!r}", "Stable Diffusion XL without its first text encoder", "give the base model")
    for part, supported in (_SUPPORTED_XL if is_xl else _SUPPORTED).items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if part not in replaced:
            check_class(found, supported, f"{part} of model {path!r}")
    modules = {}
    for part in STEMS:
        file = os.path.join(path, part, "config.json")
        if part in parts_of(index) and part not in replaced and os.path.isfile(file):
            modules[part] = build_module(part, read_json(file), file)
    file = os.path.join(path, "scheduler", SCHEDULER_CONFIG)
    if "scheduler" not in replaced and os.path.isfile(file):
        build_schedule(read_json(file), None, file)
    # Of an incomplete folder, `check_folder` says what it lacks.
    complete = {part for part in STEMS if part in parts_of(index)} == modules.keys()
    check_parts(**modules, whole=complete)
    return modules


class UNetFile(NamedTuple):
    """A UNet that replaces a model's own, before its weights are read.

    Attributes:
      module: built from its config.
      file: its weights.
      scheduler: the scheduler_config.json that it was trained with; None where its config has none.
      source: what error messages call the config.
    """

    module: UNet2DConditionModel
    file: str
    scheduler: dict[str, Any] | None
    source: str

    def load(self, dtype: Any) -> Any:
        """The parameters."""
        return load_part("unet", self.module, self.file, dtype)

    def schedule(self, base: Mapping[str, Any] | None, prediction_type: str | None) -> NoiseSchedule:
        """The noise schedule that the UNet was trained with, on that of its config or else the `base` model's."""
        claims = target_claims(self.file, prediction_type, self.scheduler or {}, self.source)
        scheduler = base if self.scheduler is None else self.scheduler
        return build_schedule({**scheduler, **merge_claims(claims)}, None, self.source)


def target_claims(file: str, prediction_type: str | None, scheduler: Mapping[str, Any], source: str) -> list[Claim]:
    """What a UNet's weight file, an argument, or else a scheduler config says of the target.

    An argument stands in place of the config; the file's own header and marks have to agree with either.
    """
    shapes = {name: tensor.shape for name, tensor in open_weights(file).items()}
    claims = [claim for claim in read_claims(file, shapes) if claim.option in TARGET_OPTIONS]
    if prediction_type is not None:
        claims.append(Claim("prediction_type", prediction_type, "prediction_type (--prediction_type)"))
    elif "prediction_type" in scheduler:
        claims.append(Claim("prediction_type", scheduler["prediction_type"], f"prediction_type in {source}"))
    return claims


def find_unet(path: str, config: str | Mapping[str, Any] | None = None) -> UNetFile:
    """Finds a UNet and builds its module; arguments and errors as `load_unet`."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"UNet {path!r} does not exist; give a UNet folder or a weight file")
    if os.path.isfile(path) and config is None:
        raise ValueError(f"{path} is a bare weight file; give its config: a name such as 'mscoco', or a json file")
    if config is None:
        content, scheduler = read_config(path), None
    else:
        from attrib_jax.convert.configs import named_config

        content, scheduler = named_config(config)
    if config is None:
        source = os.path.join(path, "config.json")
    else:
        source = "unet_config" if isinstance(config, Mapping) else os.fspath(config)
    module = build_module("unet", content, source)
    file = find_weights(path, STEMS["unet"]) if os.path.isdir(path) else path
    return UNetFile(module, file, scheduler, source)


def transformer_class(path: str) -> str | None:
    """The class of a pipeline folder whose denoiser is a transformer; None for any other path."""
    file = os.path.join(path, INDEX)
    name = read_json(file).get("_class_name") if os.path.isfile(file) else None
    return name if name in TRANSFORMER_PIPELINES else None


def load_folder(
    path: str,
    dtype: Any = jnp.float32,
    *,
    variant: str | None = None,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    unet: Any = None,
) -> Pipeline:
    """Reads a pipeline folder; arguments and errors as `load_pipeline`, but for `unet`.

    That is a `UNetFile`, or for a model with a transformer a `TransformerFile`.

    All configs are read and checked before the first tensor.
    """
    if transformer_class(path) is not None:
        from attrib_jax.convert.transformer_folder import load_transformer_folder  # no other model needs it

        given = {"tokenizer": tokenizer, "prediction_type": prediction_type}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} is given, but {path!r} is a model with a transformer, which has its own; leave it out"
                )
        return load_transformer_folder(path, read_json(os.path.join(path, INDEX)), dtype, variant, unet)
    modules, weights = check_folder(path, variant, replaced_parts(unet, tokenizer))
    file = os.path.join(path, "scheduler", SCHEDULER_CONFIG)
    if unet is not None:
        schedule = unet.schedule(None if unet.scheduler is not None else read_json(file), prediction_type)
    else:
        config = read_json(file)
        claims = target_claims(weights["unet"], prediction_type, config, file)
        schedule = build_schedule({**config, **merge_claims(claims)}, None, file)
    if unet is not None:
        modules["unet"] = unet.module
    tokenizers = _load_tokenizers(path, modules, tokenizer)
    check_parts(**modules, **tokenizers, whole=True)
    params = {part: load_part(part, modules[part], file, dtype) for part, file in weights.items()}
    if unet is not None:
        params["unet"] = unet.load(dtype)
    index = read_json(os.path.join(path, INDEX))
    # The class's own default, where an index does not say it.
    zeros = bool(index.get("force_zeros_for_empty_prompt", True)) and _SECOND in modules
    return Pipeline(**modules, **tokenizers, schedule=schedule, params=params, zeros_for_empty_prompt=zeros)


def _load_tokenizers(path: str, modules: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    """The tokenizer, or both, of a folder or of the `given` one in their place."""
    if given is not None:
        return load_given_tokenizers(given, modules)
    parts = [part for part in ("tokenizer", "tokenizer_2") if _encoder_of(part) in modules]
    return {
        part: load_tokenizer(os.path.join(path, part), modules[_encoder_of(part)].config.max_position_embeddings)
        for part in parts
    }


def _encoder_of(tokenizer: str) -> str:
    return tokenizer.replace("tokenizer", "text_encoder")


def load_given_tokenizers(
    path: str, modules: Mapping[str, Any], pad_tokens: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The tokenizer of a folder, or the two of a model with two text encoders, for a model that has none of its own.

    Stable Diffusion XL's second one has the vocabulary of the first and pads with `!`: a folder with one tokenizer
    gives both.

    Args:
      path: a tokenizer's folder, or a pipeline folder with tokenizer/ (and tokenizer_2/) in it.
      modules: the text encoders, among others.
      pad_tokens: tokenizer -> what it pads with, where the model's file says it.

    Raises FileNotFoundError and ValueError as `load_tokenizer`; ValueError where a tokenizer pads otherwise than its
    text encoder was trained.
    """
    said = pad_tokens or {}
    encoder = modules["text_encoder"].config
    first = load_tokenizer(path, encoder.max_position_embeddings)
    check_padding(first, encoder, path, said.get("tokenizer"))
    if _SECOND not in modules:
        return {"tokenizer": first}
    encoder, inner = modules[_SECOND].config, os.path.join(path, "tokenizer_2")
    if os.path.isdir(inner):
        second = load_tokenizer(inner, encoder.max_position_embeddings)
        check_padding(second, encoder, inner, said.get("tokenizer_2"))
    else:
        second = copy.deepcopy(first)
        second.pad_token = said.get("tokenizer_2") or SECOND_PADDING
    return {"tokenizer": first, "tokenizer_2": second}


def replaced_parts(unet: UNetFile | None, tokenizer: str | None) -> list[str]:
    """The parts of a folder, as it calls them, that arguments replace: they are neither read nor downloaded."""
    replaced = {
        "unet": unet is not None,
        "tokenizer": tokenizer is not None,
        "tokenizer_2": tokenizer is not None,
        "scheduler": unet is not None and unet.scheduler is not None,
    }
    return [part for part, is_replaced in replaced.items() if is_replaced]


def save_pipeline(pipeline: Pipeline, path: str | os.PathLike, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a folder that `load_pipeline` and PyTorch diffusers' Stable Diffusion pipelines open.

    One with a `PixelAutoencoder`, which diffusers does not have, is for `load_pipeline` alone.

    The folder appears only when it is complete: it is written beside its place and then renamed.

    Args:
      pipeline: what to write.
      path: the new folder.
      dtype: dtype of the written weights; None keeps that of the parameters.
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


def _write_parts(pipeline: Any, folder: str, dtype: Any) -> None:
    if type(pipeline) is not Pipeline:
        from attrib_jax.convert.transformer_folder import write_transformer_parts

        write_transformer_parts(pipeline, folder, dtype)
        return
    for part, stem in STEMS.items():
        module = getattr(pipeline, part)
        if module is None:
            continue
        config = module.config.to_dict()
        if part.startswith("text_encoder"):
            # Without it transformers 5 takes the dtype of the stored weights, while diffusers loads the other parts in
            # float32: a folder stored in half precision would then open only with an explicit dtype.
            config["dtype"] = "float32"
        write_json(config, os.path.join(folder, part, "config.json"))
        write_weights(state_dict_of(pipeline.params[part], dtype), os.path.join(folder, part, f"{stem}.safetensors"))
    save_tokenizer(pipeline.tokenizer, os.path.join(folder, "tokenizer"))
    if pipeline.tokenizer_2 is not None:
        save_tokenizer(pipeline.tokenizer_2, os.path.join(folder, "tokenizer_2"))
    scheduler = {"_class_name": "DDIMScheduler", **pipeline.schedule.to_config()}
    write_json(scheduler, os.path.join(folder, "scheduler", SCHEDULER_CONFIG))
    pixels = isinstance(pipeline.vae, PixelAutoencoder)
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["attrib_jax", PIXELS] if pixels else ["diffusers", "AutoencoderKL"],
    }
    if pipeline.text_encoder_2 is None:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    else:
        index |= {
            "_class_name": XL_PIPELINE,
            "force_zeros_for_empty_prompt": pipeline.zeros_for_empty_prompt,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    write_json(index, os.path.join(folder, INDEX))
