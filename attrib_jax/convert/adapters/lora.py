"""LoRA files of Stable Diffusion 1 and 2, merged into a pipeline's weights.

A LoRA adds scale * (alpha / rank) * up @ down to a weight W (Hu et al. 2021, eq. 3, with the scaling of PEFT and
diffusers). Without an alpha, alpha is the rank.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from attrib_jax.convert.adapters.files import (
    check_finite_as,
    is_safetensors,
    open_adapter,
    pick_file,
    read_floats,
)
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.names import from_torch, name_table, torch_shape
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.core.checks import raise_problems
from attrib_jax.core.weights import flatten_names, unflatten_names

_log = logging.getLogger(__name__)

_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_METADATA = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY, in a safetensors header
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:(?P<form>_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)"
    r"|\.lora_(?P<short_side>A|B|down|up))\.weight"
)
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# The attention of text encoders in the older form, which named all projections as the UNet's.
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}


# Patterns in the keys of adapters that this module does not merge, and what they are called.
_KINDS = (
    (r"hada_[wt]", "a LoHa"),
    (r"lokr_[wt]", "a LoKr"),
    (r"dora_scale|magnitude_vector", "a DoRA"),
    (r"\.oft_|oft_(blocks|diag|R)\b", "an OFT"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA"),
    (r"\.on_input$", "an IA3"),
    (r"lora_mid", "a LoCon with a Tucker decomposition (lora_mid)"),
    (r"\.diff(_b)?$", "a file of full differences (diff)"),
    (r"(ip_adapter|to_[kv]_ip)\b", "an IP-Adapter"),
    (r"_custom_diffusion\.", "a Custom Diffusion file, which goes to custom_diffusion (--custom_diffusion)"),
)
# Patterns in keys that do not fit the model, and the family of models that has such modules.
_FAMILIES = (
    (r"motion_modules|temporal_transformer", "a video model (AnimateDiff)"),
    (r"single_transformer_blocks|(double|single)_blocks", "FLUX"),
    (r"joint_blocks|lora_te3_|text_encoder_3\b|(^|[._])transformer_blocks[._]\d+[._]attn[._](add_[kqv]|to_add_out)",
     "Stable Diffusion 3"),
    (r"lora_prior_|lora_.*(effnet|clip_txt_mapper)", "Stable Cascade"),
    (r"(^|_)transformer[._].*(adaln_single|caption_projection)", "PixArt"),
    (r"lora_te2_|text_encoder_2\b|label_emb|add_embedding|lora_unet_(input|output|middle)_block",
     "Stable Diffusion XL"),
    (r"(down|up)_blocks[._]\d[._]attentions[._]\d[._]transformer_blocks[._][1-9]", "Stable Diffusion XL"),
    (r"mid_block[._]attentions[._]\d[._]transformer_blocks[._][1-9]", "Stable Diffusion XL"),
    (r"^(lora_)?transformer[._]", "a transformer model"),
)  # fmt: skip


@dataclasses.dataclass
class _Factors:
    """What a file holds for one weight; `keys` are its names there."""

    down: LazyTensor | None = None
    up: LazyTensor | None = None
    alpha: float | None = None
    keys: list[str] = dataclasses.field(default_factory=list)


def merge_lora(pipeline: Pipeline, path: str, scale: float = 1.0) -> Pipeline:
    """A pipeline with W + scale * (alpha / rank) * up @ down in place of every weight W that a LoRA file names.

    It is computed in float64 and rounded once to the weight's dtype. Linear layers and convolutions of the UNet and the
    text encoder are merged. Forms of the keys:
      `unet.<module>.lora_A.weight` / `lora_B` (PEFT, diffusers today), `unet.<module>.lora.down.weight` / `up`,
      `<attention>.processor.to_k_lora.down.weight` / `up` (`to_out_lora` is `to_out.0`), with or without `unet.`;
      `text_encoder.<module>.lora_A.weight`, `.lora_linear_layer.down.weight`, `.to_q_lora.down.weight`, each with or
      without the `text_model.` level;
      kohya's `lora_unet_<module with _ for .>.lora_down.weight`, `lora_te_...`, over diffusers' module names.
    Alphas are read from `.alpha` entries, or from the adapter metadata in the header of diffusers' safetensors files.

    Args:
      pipeline: the base model; it stays as it is.
      path: the file, or a folder with `pytorch_lora_weights.safetensors` or `.bin`.
      scale: strength, 1 as trained, 0 for none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `scale` is not finite; the file is damaged, or has keys that are no LoRA of this model (DoRA, LoKr and
        LoHa among them), halves of pairs, or factors of other shapes: all are listed.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}: expected a finite number, such as 1.0")
    path = pick_file(os.fspath(path), _FILES)
    tensors, plain = open_adapter(path)
    alphas = {key: value for key, value in plain.items() if key.endswith(".alpha")}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a LoRA")
    trees = {part: flatten_names(pipeline.params[part]) for part in ("unet", "text_encoder")}
    tables = {part: name_table(pipeline.params[part]) for part in trees}
    groups = _group({**tensors, **alphas}, tables, path)
    settings = _read_settings(path)
    misshaped = []
    for (part, module), pair in groups.items():
        leaf = tables[part][f"{module}.weight"]
        weight = trees[part][leaf]
        shape = torch_shape(leaf, weight.shape)
        if not _fits(pair, shape):
            misshaped.append(f"{part}.{module}: down {pair.down.shape}, up {pair.up.shape}, model {shape}")
            continue
        name = f"{part}.{module}"
        rank = pair.down.shape[0]
        up, down = (read_floats(x, path, f"{name} {side}") for x, side in ((pair.up, "up"), (pair.down, "down")))
        product = up.astype(np.float64).reshape(-1, rank) @ down.astype(np.float64).reshape(rank, -1)
        factor = scale * _strength(part, module, pair, settings.get(part), path)
        merged = np.asarray(weight, np.float64) + factor * from_torch(leaf, product.reshape(shape))
        check_finite_as(merged, weight.dtype, path, f"{name} merged with scale={scale}")
        trees[part][leaf] = jax.device_put(merged.astype(weight.dtype))
    raise_problems(f"{path} {_other_text_width(groups, trees['unet'])}:", {"misshaped": misshaped})
    ranks = sorted({pair.down.shape[0] for pair in groups.values()})
    _log.info("%s merged into %d weights, scale %g, rank %s", path, len(groups), scale, ranks)
    params = {part: unflatten_names(tree) for part, tree in trees.items()}
    return dataclasses.replace(pipeline, params=pipeline.params | params)


def _other_text_width(groups: Mapping[tuple[str, str], "_Factors"], unet: Mapping[str, Any]) -> str:
    """What does not fit, by the width of the text that the keys and values of cross-attention take."""
    own = {leaf.shape[0] for name, leaf in unet.items() if name.endswith("attn2/to_k/kernel")}
    found = {pair.down.shape[1] for (_, module), pair in groups.items() if module.endswith("attn2.to_k")}
    families = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
    if len(own) == len(found) == 1 and own != found:
        (width,), (own_width,) = found, own
        return (
            f"is made for {families.get(width, 'another model')} (text of width {width}; this model's is {own_width})"
        )
    return "does not fit the weights of this model"


def _group(content: dict[str, Any], tables: dict[str, dict], path: str) -> dict[tuple[str, str], _Factors]:
    """The entries of a file by part and module name, complete and known."""
    kohya = {
        f"{prefix}{name.removesuffix('.weight').replace('.', '_')}": (part, name.removesuffix(".weight"))
        for prefix, part in _KOHYA.items()
        for name in tables[part]
        if name.endswith(".weight")
    }
    groups: dict[tuple[str, str], _Factors] = {}
    unknown, repeated = [], []
    for key, value in content.items():
        target, role = _target(key, kohya)
        if target is None or f"{target[1]}.weight" not in tables[target[0]]:
            unknown.append(key)
            continue
        group = groups.setdefault(target, _Factors())
        group.keys.append(key)
        if getattr(group, role) is not None:
            repeated.append(key)
        elif role == "alpha":
            group.alpha = _number(value, path, key)
        else:
            setattr(group, role, value)
    halves = [key for group in groups.values() if group.down is None or group.up is None for key in group.keys]
    what = adapter_kind(content, unknown) or "has keys that cannot be merged into this model"
    raise_problems(
        f"{path} {what}. Supported: LoRA made for Stable Diffusion 1 and 2, in diffusers' or kohya's naming; merge "
        "others in PyTorch, and give the merged model.",
        {"unknown": unknown, "repeated": repeated, "without their other half": halves},
    )
    return groups


def adapter_kind(keys: Iterable[str], unknown: Iterable[str]) -> str | None:
    """What an adapter file is, by its keys and those among them that do not belong to the model: "is a LoHa made for
    Stable Diffusion XL"; None for a LoRA of which nothing more is known."""

    def first(table: tuple[tuple[str, str], ...], names: Iterable[str]) -> str | None:
        names = list(names)
        return next((what for pattern, what in table if any(re.search(pattern, name) for name in names)), None)

    unknown = list(unknown)
    kind, family = first(_KINDS, keys), first(_FAMILIES, unknown)
    if kind is None and family is None:
        return None
    return f"is {kind or 'a LoRA'}" + (f" made for {family}" if family else "")


def _target(key: str, kohya: dict[str, tuple[str, str]]) -> tuple[tuple[str, str] | None, str]:
    """A key -> ((part, module name), "down", "up" or "alpha"); None for what has no form of a LoRA's keys."""
    # diffusers' network alphas are named after the whole `..._lora.down.weight`, kohya's after the module.
    base = key.removesuffix(".alpha")
    match = _FACTOR.fullmatch(base)
    if match is None and base == key:
        return None, ""
    role = "alpha" if base != key else _SIDES[match["side"] or match["short_side"]]
    module, old = (match["module"], match["form"] == "_lora") if match else (base, False)
    if module in kohya:
        return kohya[module], role
    part, _, rest = module.partition(".")
    if part not in ("unet", "text_encoder"):
        part, rest = "unet", module
    rest = rest.replace(".processor.", ".")
    if part == "text_encoder":
        rest = rest if rest.startswith("text_model.") else f"text_model.{rest}"
        stem, _, projection = rest.rpartition(".")
        if old and projection in _TEXT_PROJECTIONS:
            rest = f"{stem}.{_TEXT_PROJECTIONS[projection]}"
    elif old and rest.endswith(".to_out"):
        rest += ".0"
    return (part, rest), role


def _number(value: Any, path: str, name: str) -> float:
    array = np.asarray(value)
    if array.size != 1 or not (array.dtype.kind in "iu" or jnp.issubdtype(array.dtype, jnp.floating)):
        raise ValueError(f"{path}: {name} is {value!r}; expected one number")
    number = float(array.reshape(()))
    if not math.isfinite(number):
        raise ValueError(f"{path}: {name} is {number}; expected a finite number")
    return number


def _fits(pair: _Factors, shape: tuple[int, ...]) -> bool:
    """Whether `up` is a linear layer or 1x1 convolution behind `down`, which has the kernel of the weight itself."""
    up, down = pair.up.shape, pair.down.shape
    if min(len(up), len(down), len(shape)) < 2 or 0 in down:
        return False
    sizes = up[:2] == (shape[0], down[0]) and down[1] == shape[1]
    return sizes and not _kernel(up) and _kernel(down) == _kernel(shape)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial size of a convolution's weight; nothing for 1x1, which is a linear layer."""
    return shape[2:] if any(size != 1 for size in shape[2:]) else ()


def _read_settings(path: str) -> dict[str, dict[str, Any]]:
    """The PEFT options by part that diffusers writes into a safetensors header; empty where there are none."""
    if not is_safetensors(path):
        return {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); copy or download it again") from error
    if not text:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {_METADATA} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: its {_METADATA} is not a JSON object; copy or download it again")
    settings: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        part, _, option = name.partition(".")
        settings.setdefault(part, {})[option] = value
    return settings


def _strength(part: str, module: str, pair: _Factors, settings: dict[str, Any] | None, path: str) -> float:
    """alpha / rank of one weight."""
    rank = pair.down.shape[0]
    if settings is None:
        return 1.0 if pair.alpha is None else pair.alpha / rank
    if pair.alpha is not None:
        raise ValueError(f"{path} gives the alpha of {part}.{module} twice, as an entry and in its {_METADATA}")
    if settings.get("use_dora"):
        raise ValueError(f"{path} is a DoRA, which this library cannot merge; merge it in PyTorch diffusers")
    alpha = settings.get("lora_alpha", rank)
    overrides = settings.get("alpha_pattern") or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"{path}: the alpha_pattern in its {_METADATA} is {overrides!r}; expected module names")
    for name, value in overrides.items():
        # PEFT takes these names for patterns that match a module or its end; diffusers writes names, some with a ^.
        if f".{module}".endswith(f".{name.removeprefix('^')}"):
            alpha = value
            break
    alpha = _number(alpha, path, f"{_METADATA} {part}.lora_alpha")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
