"""Model folders in the diffusers layout: which files they hold, and which of them to read."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
# The parts with weights, and how their weight files' names start.
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

_log = logging.getLogger(__name__)

# The class names of each part in model_index.json. A scheduler of any class is read for its noise schedule; a safety
# checker, feature extractor and image encoder do not take part in training or attribution.
_SUPPORTED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "PixelAutoencoder"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# transformers names its PyTorch files otherwise than its safetensors; diffusers does not.
_BIN_STEMS = {"model": "pytorch_model"}
_VARIANT = r"(?P<variant>(?![\w-]*-\d{5}-of-\d{5})[\w-]+)"
_FULL = "full precision"


def weight_choices(names: Collection[str], stem: str) -> dict[str | None, str]:
    """Variant -> the file of it to open, among the file names of one part's folder; None is full precision.

    A variant is there as safetensors or `.bin`, in one file or as the index of shards; the first of these is taken. The
    names are those of diffusers and transformers, with both places where they have put a variant into an index's name:
    `S.safetensors`, `S.fp16.safetensors`, `S.safetensors.index.json`, `S.safetensors.index.fp16.json`,
    `S.safetensors.fp16.index.json`.

    Args:
      names: of the files.
      stem: S in the names: "diffusion_pytorch_model", or "model" for a part of transformers, whose `.bin` files are
        called `pytorch_model`.
    """
    found: dict[str | None, str] = {}
    for start, suffix in ((stem, "safetensors"), (_BIN_STEMS.get(stem, stem), "bin")):
        single = rf"{start}(\.{_VARIANT})?\.{suffix}"
        index = rf"{start}\.{suffix}\.index(\.{_VARIANT})?\.json"
        early_index = rf"{start}\.{suffix}\.{_VARIANT}\.index\.json"
        for pattern in (single, index, early_index):
            for name in sorted(names):
                match = re.fullmatch(pattern, name)
                if match:
                    found.setdefault(match["variant"], name)
    return found


def choose_weights(names: Mapping[str, Collection[str]], variant: str | None, source: str) -> dict[str, str | None]:
    """Part -> the weight file to open (None where the part has none), among the file names of each part's folder.

    With a `variant`, a part that lacks it takes full precision, as in diffusers: `non_ema` is a UNet's alone. Without
    one, a part that has nothing but `fp16` takes that. Either is logged.

    Raises FileNotFoundError where no part has `variant`, or a part has only other variants; lists what is there.
    """
    choices = {part: weight_choices(files, STEMS[part]) for part, files in names.items()}
    if variant is not None and not any(variant in found for found in choices.values()):
        raise FileNotFoundError(f"{source} has no variant {variant!r}; it holds {_describe(choices)}")
    chosen: dict[str, str | None] = {}
    for part, found in choices.items():
        kind = next((kind for kind in (variant, None, "fp16") if kind in found), None)
        if found and kind not in found:
            raise FileNotFoundError(f"{source} has no {_FULL} weights; name a variant. It holds {_describe(choices)}")
        chosen[part] = found.get(kind)
        if found and kind != variant:
            _log.warning("%s: %s weights of %s: %s", source, kind or _FULL, part, found[kind])
    return chosen


def _describe(choices: Mapping[str, Mapping[str | None, str]]) -> str:
    kinds = {part: ", ".join(kind or _FULL for kind in found) or "no weights" for part, found in choices.items()}
    return "; ".join(f"{part}: {text}" for part, text in kinds.items())


def find_weights(folder: str, stem: str, variant: str | None = None) -> str:
    """The path for `open_weights` of the weights in one part's folder.

    Args:
      folder: such as a pipeline's unet/.
      stem: "diffusion_pytorch_model", or "model" (also "pytorch_model") for a part of transformers.
      variant: such as "fp16"; None takes full precision, or `fp16` where nothing else is there, which is logged.

    Raises FileNotFoundError where there are no such weights; lists the variants that are there.
    """
    stem = next((safe for safe, other in _BIN_STEMS.items() if stem == other), stem)
    found = weight_choices(_files(folder), stem)
    if not found:
        raise FileNotFoundError(
            f"{folder!r} has no weights: expected {stem}.safetensors, {_BIN_STEMS.get(stem, stem)}.bin, a variant such "
            "as fp16, or an index of shards"
        )
    if variant is None and None not in found and "fp16" in found:
        _log.warning("%s: fp16 weights: %s", folder, found["fp16"])
        variant = "fp16"
    if variant not in found:
        held = ", ".join(kind or _FULL for kind in found)
        raise FileNotFoundError(f"{folder!r} has no {variant or _FULL} weights; it holds {held}; name one as variant")
    return os.path.join(folder, found[variant])


def check_folder(path: str, variant: str | None = None, replaced: Collection[str] = ()) -> dict[str, str]:
    """Checks that a pipeline folder is complete and of a supported family -> the weight file of each part.

    Args:
      path: the folder.
      variant: of the weight files, as for `choose_weights`.
      replaced: parts, as the folder calls them, that another one stands in for: they are left out of the checks.

    Raises:
      FileNotFoundError: files are missing (all are listed), or the variant is.
      ValueError: model_index.json is damaged, or names a pipeline or part of another class.
    """
    if not os.path.isfile(os.path.join(path, INDEX)):
        raise FileNotFoundError(f"{path!r} has no {INDEX}; give the top folder of a pipeline in the diffusers layout")
    _check_classes(read_json(os.path.join(path, INDEX)), path, replaced)
    names = {part: _files(os.path.join(path, part)) for part in STEMS if part not in replaced}
    chosen = choose_weights(names, variant, f"model folder {path!r}")
    missing = []
    for part, files in names.items():
        missing += [] if "config.json" in files else [f"{part}/config.json"]
        missing += [] if chosen[part] else [f"{part}/{STEMS[part]}.safetensors"]
    if "scheduler" not in replaced and SCHEDULER_CONFIG not in _files(os.path.join(path, "scheduler")):
        missing.append(f"scheduler/{SCHEDULER_CONFIG}")
    if "tokenizer" not in replaced and not os.path.isdir(os.path.join(path, "tokenizer")):
        missing.append("tokenizer/")
    if missing:
        raise FileNotFoundError(f"model folder {path!r} is incomplete, it lacks: {', '.join(missing)}")
    return {part: os.path.join(path, part, name) for part, name in chosen.items() if name}


def _files(folder: str) -> list[str]:
    """The names of a folder's files; a link to nothing, as an interrupted download leaves it, is none."""
    if not os.path.isdir(folder):
        return []
    return [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]


def _check_classes(index: dict[str, Any], path: str, replaced: Collection[str]) -> None:
    class_name = index.get("_class_name")
    if class_name != "StableDiffusionPipeline":
        raise ValueError(
            f"{path!r} is a {class_name!r}; supported: 'StableDiffusionPipeline' (the Stable Diffusion 1 and 2 family)"
        )
    for part, supported in _SUPPORTED.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if part not in replaced and found not in supported:
            raise ValueError(f"{path!r} has {part} of class {found!r}; supported: {', '.join(supported)}")


def read_config(folder: str) -> dict[str, Any]:
    """The content of a part's config.json; raises FileNotFoundError and ValueError as `read_json`."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder!r} has no config.json; give a model folder in the diffusers layout")
    return read_json(path)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; raises ValueError, naming the file, where it is damaged or holds something else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(content: Mapping[str, Any], path: str) -> None:
    """Writes a JSON object, its keys sorted; makes the folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
