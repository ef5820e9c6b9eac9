"""Feature towers: transformers folders of CLIP, DINO and DINOv2 with registers <-> Flax modules and parameters."""

import dataclasses
import functools
import os
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.convert.config_files import check_values, read_config, write_json
from attrib_jax.convert.hub import resolve_tower
from attrib_jax.convert.image_processor import ImageProcessor, load_image_processor, save_image_processor
from attrib_jax.convert.tokenizer import load_tokenizer, save_tokenizer
from attrib_jax.convert.weights.files import find_weights, open_weights, write_weights
from attrib_jax.convert.weights.names import tower_names
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params, state_dict_of
from attrib_jax.convert.weights.tensors import Tensor
from attrib_jax.core.checks import check_choice
from attrib_jax.core.durable import new_folder
from attrib_jax.core.fingerprint import files_digest
from attrib_jax.models.clip import CLIPTextConfig
from attrib_jax.models.clip_towers import CLIPConfig, CLIPModel, CLIPVisionConfig
from attrib_jax.models.vit import Dinov2Config, VisionTransformer, ViTConfig

_STEM = "model"


@dataclasses.dataclass(frozen=True, eq=False)
class Tower:
    """A model whose features tell how alike images are, with all that it needs to read them.

    Attributes:
      family: `clip`, `dino` (a ViT) or `dinov2` (with registers).
      module: Flax module with a method `image_features(pixels)`, and of CLIP `text_features(input_ids)`.
      params: its parameters, a nested dict of arrays.
      processor: makes pixels of images; None for a CLIP text tower alone.
      tokenizer: of a CLIP text tower, a `transformers.CLIPTokenizer`; None for others.
    """

    family: str
    module: Any
    params: Any
    processor: ImageProcessor | None
    tokenizer: Any = None


# model_type of config.json -> family and module.
_FAMILIES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "clip": ("clip", lambda config: CLIPModel(CLIPConfig.from_dict(config))),
    "clip_vision_model": ("clip", lambda config: CLIPModel(CLIPConfig.from_dict(config))),
    "clip_text_model": ("clip", lambda config: CLIPModel(CLIPConfig.from_dict(config))),
    "vit": ("dino", lambda config: VisionTransformer(ViTConfig.from_dict(config))),
    "dinov2_with_registers": ("dinov2", lambda config: VisionTransformer(Dinov2Config.from_dict(config))),
}


def load_tower(path: str | os.PathLike, family: str | None = None, dtype: Any = jnp.float32) -> Tower:
    """Reads a transformers folder: CLIP (both towers, or one with its projection), ViT, or DINOv2 with registers.

    Weights are read as safetensors or `.bin`, whole or in shards, the pooler and mask token of vision models left out;
    preprocessor_config.json and, for a text tower, the tokenizer's files lie beside them.

    Args:
      path: the folder, or a Hugging Face id `owner/name[@revision]`.
      family: `clip`, `dino` or `dinov2`, where another one would be a mistake; None takes any.
      dtype: dtype of the loaded parameters, whatever the files hold.

    Raises:
      FileNotFoundError: there is no such folder, or files in it are missing.
      ValueError: a model of another family or with options that this library lacks, a tensor that is missing,
        unexpected or misshaped, or a damaged file.
    """
    if family is not None:
        check_choice("family", family, _EXAMPLES)
    path = resolve_tower(path, check=lambda folder: _build(folder, family))
    own_family, module = _build(path, family)
    weights = find_weights(path, _STEM)
    params = load_params(tower_names(open_weights(weights)), abstract_tower_params(module), dtype, source=weights)
    has_text = isinstance(module, CLIPModel) and module.config.text is not None
    has_images = not isinstance(module, CLIPModel) or module.config.vision is not None
    processor = load_image_processor(path) if has_images else None
    if processor is not None:
        _check_side(processor, module, path)
    tokenizer = load_tokenizer(path, module.config.text.max_position_embeddings) if has_text else None
    return Tower(own_family, module, params, processor, tokenizer)


def _build(path: str, family: str | None) -> tuple[str, Any]:
    """The family and Flax module that a folder's config.json describes."""
    config = read_config(path)
    source = os.path.join(path, "config.json")
    found = config.get("model_type")
    if not isinstance(found, str) or found not in _FAMILIES:
        raise ValueError(
            f"tower {path!r} has model_type={found!r} in its config.json; supported: {', '.join(_FAMILIES)}"
        )
    own_family, make = _FAMILIES[found]
    if family is not None and own_family != family:
        raise ValueError(
            f"tower {path!r} is of the family {own_family!r} (model_type={found!r}); expected {family!r}: "
            f"{_EXAMPLES[family]}"
        )
    sections = [config]
    if found == "clip":
        names = ("text_config", "vision_config")
        check_values(config, dict.fromkeys(names, dict | None), source)
        sections = [config.get(name) or {} for name in names]
    check_values(config, {"projection_dim": int}, source)
    for section in sections:
        check_values(section, _OPTIONS, source)
    try:
        return own_family, make(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


# Options of the towers' configs; those of a CLIP model are in its text_config and vision_config.
_OPTIONS: dict[str, Any] = {"num_channels": int} | {
    name: hint
    for config in (CLIPTextConfig, CLIPVisionConfig, ViTConfig, Dinov2Config)
    for name, hint in typing.get_type_hints(config).items()
    if name != "MODEL_TYPE"
}
_EXAMPLES = {
    "clip": "a folder like that of openai/clip-vit-base-patch32",
    "dino": "a folder like that of facebook/dino-vitb16",
    "dinov2": "a folder like that of facebook/dinov2-with-registers-large",
}


def _check_side(processor: ImageProcessor, module: Any, path: str) -> None:
    config = module.config.vision if isinstance(module, CLIPModel) else module.config
    fits = processor.side == config.image_size
    if isinstance(config, Dinov2Config):
        fits = processor.side % config.patch_size == 0
    if not fits:
        raise ValueError(
            f"tower {path!r}: its image processor makes images of {processor.side} pixels, its model has "
            f"image_size={config.image_size} and patch_size={config.patch_size}; take both files from one model"
        )


@functools.cache
def abstract_tower_params(module: Any) -> Any:
    """The shapes of a tower's parameters; no array is made."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if not isinstance(module, CLIPModel):
        return abstract_params(module, _images(module.config))
    vision = module.config.vision
    return abstract_params(module, None if vision is None else _images(vision), ids)


def _images(config: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)


def tower_fingerprint(path: str | os.PathLike) -> str:
    """sha256 of the files that `load_tower` reads: whatever decides the features."""
    path = resolve_tower(path, check=lambda folder: _build(folder, None))
    read_config(path)
    weights = find_weights(path, _STEM)
    names = sorted(os.listdir(path))
    shards = [name for name in names if name.endswith((".safetensors", ".bin"))] if weights.endswith(".json") else []
    texts = [name for name in names if name.endswith((".json", ".txt")) and not name.endswith(".index.json")]
    files = [os.path.join(path, name) for name in {*texts, *shards, os.path.basename(weights)}]
    return _digest(tuple((file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in sorted(files)))


@functools.lru_cache(16)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    # Kept as long as no file has changed: every query of a run asks for it.
    return files_digest(file for file, _, _ in files)


def save_tower(tower: Tower, path: str | os.PathLike, dtype: Any = None) -> None:
    """Writes a CLIP tower of both halves as a folder that `load_tower` and transformers' CLIPModel open.

    The folder takes its name when it is complete, in the place of one that was there.

    Args:
      tower: what to write.
      path: the folder.
      dtype: dtype of the written weights; None keeps that of the parameters.
    """
    with new_folder(os.path.abspath(path)) as fresh:
        write_json(tower.module.config.to_dict(), str(fresh / "config.json"))
        state: dict[str, Tensor] = dict(state_dict_of(tower.params, dtype))
        write_weights(state, str(fresh / f"{_STEM}.safetensors"))
        save_image_processor(tower.processor, str(fresh))
        save_tokenizer(tower.tokenizer, str(fresh))
