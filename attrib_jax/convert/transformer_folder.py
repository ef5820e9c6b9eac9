"""Folders of diffusion transformers in the diffusers layout, read and written: SD 3 and 3.5, FLUX.1, PixArt."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.convert.config_files import check_values, read_json, write_json
from attrib_jax.convert.parts import build_module, build_schedule, load_part
from attrib_jax.convert.tokenizer import load_tokenizer, save_tokenizer
from attrib_jax.convert.transformer_pipeline import FAMILIES, TransformerPipeline, tokenizer_of
from attrib_jax.convert.weights.files import choose_weights, list_files, open_weights, stem_of, write_weights
from attrib_jax.convert.weights.names import t5_names, text_encoder_names
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params, state_dict_of
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTextProjectionConfig
from attrib_jax.models.flux import FluxConfig, FluxTransformer2DModel
from attrib_jax.models.pixart import PixArtConfig, PixArtTransformer2DModel
from attrib_jax.models.sd3 import SD3Config, SD3Transformer2DModel
from attrib_jax.models.t5 import T5Config, T5EncoderModel

DENOISERS: dict[str, tuple[Any, Any]] = {
    "StableDiffusion3Pipeline": (SD3Transformer2DModel, SD3Config),
    "FluxPipeline": (FluxTransformer2DModel, FluxConfig),
    "PixArtSigmaPipeline": (PixArtTransformer2DModel, PixArtConfig),
    "PixArtAlphaPipeline": (PixArtTransformer2DModel, PixArtConfig),
}
_ENCODER_CONFIGS: dict[type, Any] = {
    CLIPTextModel: CLIPTextConfig,
    CLIPTextModelWithProjection: CLIPTextProjectionConfig,
    T5EncoderModel: T5Config,
}
_log = logging.getLogger(__name__)

_TRANSFORMER, _VAE = "transformer", "vae"


def check_transformer_folder(
    path: str, index: Mapping[str, Any], transformer: Any = None
) -> tuple[dict[str, Any], Any]:
    """Checks the configs of a folder whose model_index.json is `index` -> part -> module, and the noise schedule.

    `transformer` is a module that stands in for the folder's own, which may then be missing.

    Raises:
      FileNotFoundError: parts are missing; all are listed.
      ValueError: a part is of another class, or a config has a value that is not supported; says which.
    """
    class_name = index["_class_name"]
    family = FAMILIES[class_name]
    encoders = {part: cls for part, cls in family.encoders.items() if _class_of(index, part) is not None}
    absent = [part for part in family.encoders if part not in encoders and part not in family.optional]
    if absent:
        raise ValueError(f"model {path!r}: {', '.join(absent)} is null in model_index.json; {family.name} needs it")
    module_class, config_class = DENOISERS[class_name]
    own = {_TRANSFORMER: module_class} if transformer is None else {}
    for part, cls in {**own, **encoders}.items():
        if _class_of(index, part) != cls.__name__:
            raise ValueError(
                f"model {path!r}: {part} is of class {_class_of(index, part)!r}; expected {cls.__name__!r}"
            )
    files = {part: os.path.join(path, part, "config.json") for part in (*own, _VAE, *encoders)}
    scheduler = os.path.join(path, "scheduler", "scheduler_config.json")
    folders = [os.path.join(path, tokenizer_of(part)) for part in encoders]
    missing = [name for name in (*files.values(), scheduler, *folders) if not os.path.exists(name)]
    if missing:
        listed = ", ".join(os.path.relpath(name, path) for name in missing)
        raise FileNotFoundError(
            f"model folder {path!r} is incomplete, it lacks: {listed}. Of a Hugging Face id, download the whole "
            "repository of a model with a transformer, and give its folder"
        )
    if transformer is None:
        transformer = module_class(_read(config_class, files[_TRANSFORMER]))
    modules = {_TRANSFORMER: transformer}
    modules[_VAE] = build_module("vae", read_json(files[_VAE]), files[_VAE])
    for part, cls in encoders.items():
        modules[part] = cls(_read(_ENCODER_CONFIGS[cls], files[part]))
    schedule = build_schedule(read_json(scheduler), None, scheduler)
    wants_flow = not class_name.startswith("PixArt")
    if wants_flow != (schedule.prediction_type == "flow"):
        raise ValueError(
            f"{scheduler}: the model is {family.name}, but its scheduler's prediction is {schedule.prediction_type!r}"
        )
    if class_name == "FluxPipeline":
        schedule = schedule.replace(uniform_sigmas=True)
    return modules, schedule


def load_transformer_folder(
    path: str,
    index: Mapping[str, Any],
    dtype: Any = jnp.float32,
    variant: str | None = None,
    transformer: Any = None,
) -> TransformerPipeline:
    """Reads a folder whose model_index.json is `index`; all configs are read and checked before the first tensor.

    `transformer` is a `TransformerFile` that replaces the folder's own.

    Raises as `check_transformer_folder`, and where weights are missing or do not fit their config.
    """
    modules, schedule = check_transformer_folder(path, index, transformer and transformer.module)
    for part in FAMILIES[index["_class_name"]].optional:
        if part not in modules:
            _log.warning("%s: the model has no %s; zeros stand for its text states, as in diffusers", path, part)
    replaced = [] if transformer is None else [_TRANSFORMER]
    names = {part: list_files(os.path.join(path, part)) for part in modules if part not in replaced}
    chosen = choose_weights(names, variant, f"model folder {path!r}")
    absent = [part for part, name in chosen.items() if name is None]
    if absent:
        raise FileNotFoundError(f"model folder {path!r} is incomplete, it lacks weights in: {', '.join(absent)}")
    weights = {part: os.path.join(path, part, name) for part, name in chosen.items() if name}
    tokenizers = {
        tokenizer_of(part): load_tokenizer_of(os.path.join(path, tokenizer_of(part)), module)
        for part, module in modules.items()
        if part not in (_TRANSFORMER, _VAE)
    }
    params = {part: _load(part, modules[part], file, dtype) for part, file in weights.items()}
    params["unet"] = params.pop(_TRANSFORMER) if transformer is None else transformer.load(dtype)
    return TransformerPipeline(
        unet=modules.pop(_TRANSFORMER),
        **modules,
        **tokenizers,
        schedule=schedule,
        params=params,
        class_name=index["_class_name"],
    )


def write_transformer_parts(pipeline: TransformerPipeline, folder: str, dtype: Any) -> None:
    """Writes all files of a pipeline into `folder`, for `load_transformer_folder` and diffusers."""
    modules = {_TRANSFORMER: pipeline.unet, _VAE: pipeline.vae, **pipeline.encoders}
    scheduler = pipeline.schedule.to_config()
    name = scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    index: dict[str, Any] = {"_class_name": pipeline.class_name, "scheduler": ["diffusers", name]}
    for part, module in modules.items():
        is_text = part in pipeline.encoders
        # As for the other folders, see `_write_parts` there.
        config = module.config.to_dict() | ({"dtype": "float32"} if is_text else {})
        write_json(config, os.path.join(folder, part, "config.json"))
        params = pipeline.params["unet" if part == _TRANSFORMER else part]
        file = os.path.join(folder, part, f"{stem_of(part)}.safetensors")
        write_weights(state_dict_of(params, dtype), file)
        index[part] = ["transformers" if is_text else "diffusers", type(module).__name__]
    for part, tokenizer in pipeline.tokenizers.items():
        is_t5 = isinstance(pipeline.encoders[part.replace("tokenizer", "text_encoder")], T5EncoderModel)
        if is_t5:
            tokenizer.save_pretrained(os.path.join(folder, part))
        else:
            save_tokenizer(tokenizer, os.path.join(folder, part))
        index[part] = ["transformers", "T5TokenizerFast" if is_t5 else "CLIPTokenizer"]
    for part in pipeline.family.optional:
        for absent in (part, tokenizer_of(part)):
            index.setdefault(absent, [None, None])
    if pipeline.class_name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    write_json(scheduler, os.path.join(folder, "scheduler", "scheduler_config.json"))
    write_json(index, os.path.join(folder, "model_index.json"))


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else entry


def _read(config_class: Any, file: str) -> Any:
    return read_module_config(config_class, read_json(file), file)


def read_module_config(config_class: Any, content: Mapping[str, Any], file: str) -> Any:
    """The config dataclass of a config.json; raises ValueError, naming the file, the key and its value."""
    # Stable Diffusion 3 lists the dual layers that it does not have.
    check_values({name: value for name, value in content.items() if value != []}, config_class, file)
    try:
        return config_class.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_tokenizer_of(folder: str, module: Any) -> Any:
    """The tokenizer in a folder, for a text encoder."""
    if not isinstance(module, T5EncoderModel):
        return load_tokenizer(folder, module.config.max_position_embeddings)
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        raise FileNotFoundError(
            f"{folder!r} has no tokenizer.json; make one from its spiece.model: "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder), with sentencepiece installed"
        )
    from transformers import T5Tokenizer

    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of the tokenizers library, which has no class of its own for a damaged file
        raise ValueError(f"the tokenizer in {folder!r} cannot be read: {error}") from error


def _load(part: str, module: Any, file: str, dtype: Any) -> Any:
    if part == _VAE:
        return load_part("vae", module, file, dtype)
    state = dict(open_weights(file))
    if isinstance(module, T5EncoderModel):
        state = t5_names(state)
    elif part != _TRANSFORMER:
        state = text_encoder_names(state)
    return load_params(state, abstract_module(module), dtype, source=file)


@functools.cache
def abstract_module(module: Any) -> Any:
    """The shapes of a transformer's or text encoder's parameters; no array is made."""
    config = module.config
    if not hasattr(config, "conditioning"):
        return abstract_params(module, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    shapes = {name: (1, *(size or 1 for size in shape)) for name, shape in config.conditioning.items()}
    conditioning = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    side = 2 * getattr(config, "patch_size", 1)
    latents = jax.ShapeDtypeStruct((1, side, side, config.latent_channels), jnp.float32)
    return abstract_params(module, latents, jax.ShapeDtypeStruct((1,), jnp.int32), conditioning)
