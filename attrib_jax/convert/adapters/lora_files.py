"""Reading LoRA, LoHa, LoKr and DoRA files: which weight of a pipeline each tensor belongs to, and its strength."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from attrib_jax.convert.adapters import lora_forms
from attrib_jax.convert.adapters.files import is_safetensors, open_adapter, pick_file
from attrib_jax.convert.ldm.names import swap_halves
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.names import name_table, torch_shape
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.core.checks import raise_problems
from attrib_jax.core.weights import flatten_names
from attrib_jax.models.unet import UNetConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_CONFIG, _PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
_FILES = (LORA_FILE, "pytorch_lora_weights.bin", _PEFT_FILE)
_METADATA = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY, in a safetensors header

# Parts of a pipeline, and what kohya calls them; in dotted names they have their own.
_KOHYA_PARTS = {
    "unet": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),
    "text_encoder_3": ("lora_te3_",),
}
# What files put before the module names of the original transformers.
_ORIGINAL_PREFIXES = re.compile(r"(model\.)?diffusion_model\.")
# How a tensor's name ends, and its role in the change of a weight.
_ENDINGS = tuple(
    re.compile(rf"(?P<module>.+?){ending}")
    for ending in (
        r"(?P<form>_lora|\.lora|\.lora_linear_layer)\.(?P<role>down|up)\.weight",
        r"(?P<form>)\.lora_(?P<role>A|B|down|up|mid)\.weight",
        r"(?P<form>)\.(?P<role>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)(\.weight)?",
        r"(?P<form>)\.(?P<role>dora_scale|lora_magnitude_vector)(\.weight)?",
    )
)
_SIDES = {"A": "down", "B": "up"}
# The attention of text encoders in the older form, which named all projections as the UNet's.
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

# Patterns in the keys of adapters, and what they are called.
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
    (r"processor\.(qkv|proj)_lora[12]?\.", "a LoRA in XLabs' naming, which diffusers can convert,"),
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
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


@dataclasses.dataclass
class WeightChange:
    """What a file holds for one weight.

    Attributes:
      tensors: role -> tensor, see `lora_forms`.
      keys: their names in the file.
      alpha: where the file has it beside them.
      leaf: Flax path of the weight.
      strength: alpha / rank, by which the change is multiplied.
      block: (number, count) where it is one of several weights that the file has as one.
    """

    tensors: dict[str, LazyTensor] = dataclasses.field(default_factory=dict)
    keys: list[str] = dataclasses.field(default_factory=list)
    alpha: float | None = None
    leaf: str = ""
    strength: float = 1.0
    block: tuple[int, int] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Role -> shape."""
        return {role: tensor.shape for role, tensor in self.tensors.items()}


def denoiser_part(pipeline: Pipeline) -> str:
    """What LoRA files call the denoiser: `unet` or `transformer`."""
    return "unet" if isinstance(pipeline.unet.config, UNetConfig) else "transformer"


def read_lora(path: str, pipeline: Pipeline) -> tuple[str, dict[tuple[str, str], WeightChange]]:
    """The file that `path` is or holds, and what it changes: (part, PyTorch module name) -> change.

    The denoiser's part is `unet`, as in `Pipeline.params`, also where it is a transformer. Nothing is read but names,
    shapes and alphas; all of them fit the weights of `pipeline`.

    Raises FileNotFoundError and ValueError as `merge_lora`.
    """
    path = pick_file(os.fspath(path), _FILES)
    tensors, plain = open_adapter(path)
    alphas = {key: value for key, value in plain.items() if key.endswith(".alpha")}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a LoRA")
    tables = {part: name_table(params) for part, params in pipeline.params.items() if part in _KOHYA_PARTS}
    changes = _group({**tensors, **alphas}, tables, pipeline, path)
    settings = _read_settings(path, any(key.startswith(_PEFT_PREFIX) for key in tensors))
    if denoiser_part(pipeline) in settings:
        settings["unet"] = settings[denoiser_part(pipeline)]
    misshaped = []
    for (part, module), found in changes.items():
        found.leaf = tables[part][f"{module}.weight"]
        shape = torch_shape(found.leaf, flatten_names(pipeline.params[part])[found.leaf].shape)
        if lora_forms.fits(found.shapes, shape):
            found.strength = _strength(part, module, found, settings.get(part, settings.get("")), path)
        else:
            own = ", ".join(f"{role} {size}" for role, size in found.shapes.items())
            misshaped.append(f"{part}.{module}: {own}, model {shape}")
    raise_problems(f"{path} {_other_base(changes, pipeline)}:", {"misshaped": misshaped})
    return path, changes


def _other_base(changes: Mapping[tuple[str, str], WeightChange], pipeline: Pipeline) -> str:
    """What does not fit, by the width of the text that the keys and values of cross-attention take."""
    unet = flatten_names(pipeline.params.get("unet", {}))
    own = {leaf.shape[0] for name, leaf in unet.items() if name.endswith("attn2/to_k/kernel")}
    made_for = (
        lora_forms.changed_shape(found.shapes)
        for (_, module), found in changes.items()
        if module.endswith("attn2.to_k")
    )
    found = {shape[1] for shape in made_for if shape is not None}
    if len(own) == len(found) == 1 and own != found:
        (width,), (own_width,) = found, own
        family = _TEXT_WIDTHS.get(width, "another model")
        return f"is made for {family} (text of width {width}; this model's is {own_width})"
    return "does not fit the weights of this model"


def _group(
    content: dict[str, Any], tables: dict[str, dict], pipeline: Pipeline, path: str
) -> dict[tuple[str, str], WeightChange]:
    """The entries of a file by part and module name, complete and known."""
    originals = _original_modules(pipeline, tables)
    kohya = _kohya_names(content, tables, pipeline) | {
        f"lora_unet_{module.replace('.', '_')}": ("unet", module) for module in originals
    }
    changes: dict[tuple[str, str], WeightChange] = {}
    unknown, repeated = [], []
    for key, value in content.items():
        target, role = _target(key, kohya, tables, denoiser_part(pipeline))
        is_known = target is not None and f"{target[1]}.weight" in tables.get(target[0], {})
        if target is None or not (is_known or (target[0] == "unet" and target[1] in originals)):
            unknown.append(key)
            continue
        found = changes.setdefault(target, WeightChange())
        found.keys.append(key)
        if role in found.tensors or (role == "alpha" and found.alpha is not None):
            repeated.append(key)
        elif role == "alpha":
            found.alpha = _number(value, path, key)
        else:
            found.tensors[role] = value
    parts = [
        key for found in changes.values() if not lora_forms.is_complete(found.tensors.keys()) for key in found.keys
    ]
    what = adapter_kind(content, unknown) or "has keys that cannot be merged into this model"
    raise_problems(
        f"{path} {what}. Supported: LoRA, LoHa, LoKr and DoRA made for the model that is loaded, in diffusers', PEFT's "
        "or kohya's naming; merge others in PyTorch, and give the merged model.",
        {"unknown": unknown, "repeated": repeated, "without their other half": parts},
    )
    return _split_fused(changes, originals, path)


def _original_modules(pipeline: Pipeline, tables: Mapping[str, dict]) -> dict[str, Any]:
    """Module name in the original code of SD 3 and FLUX.1 -> the `Stored` of its weight; none for other models."""
    if denoiser_part(pipeline) == "unet":
        return {}
    from attrib_jax.convert.ldm.transformers import ORIGINAL_CONFIGS, transformer_table

    config = pipeline.unet.config
    if not isinstance(config, ORIGINAL_CONFIGS):
        return {}
    names = {name for name in tables["unet"] if ".lora_" not in name}
    return {
        name.removesuffix(".weight"): stored
        for name, stored in transformer_table(config, names).items()
        if name.endswith(".weight") and name not in names
    }


def _split_fused(
    changes: Mapping[tuple[str, str], WeightChange], originals: Mapping[str, Any], path: str
) -> dict[tuple[str, str], WeightChange]:
    """Changes of matrices that the original code has as one, as those of the weights in them, each with its rows."""
    split: dict[tuple[str, str], WeightChange] = {}
    repeated, unsupported = [], []
    for (part, module), found in changes.items():
        stored = originals.get(module) if part == "unet" else None
        if stored is None:
            pieces = {module: found}
        elif len(stored.names) == 1 and not stored.is_swapped:
            pieces = {stored.names[0].removesuffix(".weight"): found}
        elif found.tensors.keys() != {"down", "up"} or found.tensors["up"].shape[:1] == ():
            unsupported += found.keys
            continue
        else:
            shares, up = stored.shares or (1,) * len(stored.names), found.tensors["up"]
            if up.shape[0] % (2 * sum(shares)):
                raise ValueError(f"{path} does not fit this model: the factors of {module} have {up.shape[0]} rows")
            up = up.map(swap_halves) if stored.is_swapped else up
            ups = up.split(shares) if len(shares) > 1 else (up,)
            pieces = {
                name.removesuffix(".weight"): dataclasses.replace(
                    found, tensors=found.tensors | {"up": own}, block=(number, len(shares))
                )
                for number, (name, own) in enumerate(zip(stored.names, ups, strict=True))
            }
        repeated += [key for name in pieces for key in found.keys if (part, name) in split]
        split |= {(part, name): piece for name, piece in pieces.items()}
    raise_problems(
        f"{path} changes weights twice, or weights that the original code has as one otherwise than by two factors; "
        "merge it in PyTorch, and give the merged model.",
        {"repeated": repeated, "of another form": unsupported},
    )
    return split


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


def _kohya_names(content: Iterable[str], tables: dict[str, dict], pipeline: Pipeline) -> dict[str, tuple[str, str]]:
    """kohya's name of each module, with `_` for `.` -> (part, PyTorch name)."""
    names = {
        f"{prefix}{name.removesuffix('.weight').replace('.', '_')}": (part, name.removesuffix(".weight"))
        for part, table in tables.items()
        for prefix in _KOHYA_PARTS[part]
        for name in table
        if name.endswith(".weight")
    }
    if "unet" in tables and any(re.match(r"lora_unet_(input|middle|output)_block", key) for key in content):
        # As the original code names the modules, which is what kohya's programs do for Stable Diffusion XL.
        from attrib_jax.convert.ldm.names import UNET, unet_table

        for original, stored in unet_table(pipeline.unet.config, tables["unet"]).items():
            module = original.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
            names[f"lora_unet_{module}"] = "unet", stored.names[0].removesuffix(".weight")
    return names


def _target(key: str, kohya: dict, tables: Mapping[str, Mapping], denoiser: str) -> tuple[tuple[str, str] | None, str]:
    """A key -> ((part, module name), role or "alpha"); None for what has no form of an adapter's keys."""
    # diffusers' network alphas are named after the whole `..._lora.down.weight`, kohya's after the module.
    base = key.removesuffix(".alpha")
    module, form, role = _split(base)
    if not role and base == key:
        return None, ""
    role = "alpha" if base != key else role
    if module in kohya:
        return kohya[module], role
    part, _, rest = module.partition(".")
    if module.startswith(_PEFT_PREFIX):
        # PEFT's own files do not say which part they are for.
        rest = module.removeprefix(_PEFT_PREFIX)
        candidates = ((part, f"{_text_name(part, rest, tables)}.weight") for part in tables)
        part = next((part for part, name in candidates if name in tables[part]), "unet")
    elif part == denoiser:
        part = "unet"
    elif part in ("unet", "transformer"):
        return None, ""
    elif part not in _KOHYA_PARTS:
        part, rest = "unet", module
    if part == "unet" and denoiser != "unet":
        rest = _ORIGINAL_PREFIXES.sub("", rest, count=1)
    rest = _text_name(part, rest.replace(".processor.", "."), tables)
    stem, _, projection = rest.rpartition(".")
    if form == "_lora" and part.startswith("text_encoder") and projection in _TEXT_PROJECTIONS:
        rest = f"{stem}.{_TEXT_PROJECTIONS[projection]}"
    elif form == "_lora" and rest.endswith(".to_out"):
        rest += ".0"
    return (part, rest), role


def _split(key: str) -> tuple[str, str, str]:
    """A key -> module, form of a factor's name, role; role is empty where it is none of an adapter's."""
    for ending in _ENDINGS:
        match = ending.fullmatch(key)
        if match:
            return match["module"], match["form"], _SIDES.get(match["role"], match["role"])
    return key, "", ""


def _text_name(part: str, module: str, tables: Mapping[str, Mapping]) -> str:
    """A CLIP text encoder's module with the `text_model.` level, which newer files leave out."""
    if not part.startswith("text_encoder") or f"{module}.weight" in tables.get(part, {}):
        return module
    if not module.startswith("text_model."):
        return f"text_model.{module}"
    return module


def _number(value: Any, path: str, name: str) -> float:
    array = np.asarray(value)
    if array.size != 1 or not (array.dtype.kind in "iu" or jnp.issubdtype(array.dtype, jnp.floating)):
        raise ValueError(f"{path}: {name} is {value!r}; expected one number")
    number = float(array.reshape(()))
    if not math.isfinite(number):
        raise ValueError(f"{path}: {name} is {number}; expected a finite number")
    return number


def _read_settings(path: str, is_peft: bool) -> dict[str, dict[str, Any]]:
    """The PEFT options by part: from a safetensors header as diffusers writes it, or for "", all parts, from the config
    beside PEFT's own files, which have no alpha elsewhere."""
    settings: dict[str, dict[str, Any]] = {}
    config = os.path.join(os.path.dirname(path), _PEFT_CONFIG)
    if is_peft and not os.path.isfile(config):
        raise FileNotFoundError(f"{path} has PEFT's names, and there is no {_PEFT_CONFIG} beside it with the alpha")
    if is_peft:
        with open(config, encoding="utf-8") as file:
            settings[""] = _json_object(file.read(), path, _PEFT_CONFIG)
    if not is_safetensors(path):
        return settings
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); copy or download it again") from error
    for name, value in _json_object(text, path, _METADATA).items() if text else ():
        part, _, option = name.partition(".")
        settings.setdefault(part, {})[option] = value
    return settings


def _json_object(text: str, path: str, name: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {name} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: its {name} is not a JSON object; copy or download it again")
    return options


def _strength(part: str, module: str, found: WeightChange, settings: dict[str, Any] | None, path: str) -> float:
    """alpha / rank of one weight."""
    rank = lora_forms.rank(found.shapes)
    if settings is None:
        # A LoKr of two whole factors has no rank, and LyCORIS then ignores its alpha.
        return 1.0 if found.alpha is None or rank is None else found.alpha / rank
    if found.alpha is not None:
        raise ValueError(f"{path} gives the alpha of {part}.{module} twice, as an entry and in its {_METADATA}")
    if settings.get("use_dora") and not found.tensors.keys() & set(lora_forms.MAGNITUDES):
        raise ValueError(f"{path} is a DoRA by its {_METADATA}, but {part}.{module} has no magnitude; save it again")
    if rank is None:
        rank = int(_number(_by_module(settings, "rank_pattern", "r", module, None, path), path, f"{_METADATA} r"))
    default = "lora_alpha" if "lora_alpha" in settings else "alpha"
    alpha = _by_module(settings, "alpha_pattern", default, module, rank, path)
    alpha = _number(alpha, path, f"{_METADATA} {part}.{default}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_module(settings: Mapping[str, Any], pattern: str, option: str, module: str, default: Any, path: str) -> Any:
    """An option of PEFT, or what its pattern says for a module."""
    overrides = settings.get(pattern) or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"{path}: the {pattern} in its {_METADATA} is {overrides!r}; expected module names")
    for name, value in overrides.items():
        # PEFT takes these names for patterns that match a module or its end; diffusers writes names, some with a ^.
        if f".{module}".endswith(f".{name.removeprefix('^')}"):
            return value
    return settings.get(option, default)
