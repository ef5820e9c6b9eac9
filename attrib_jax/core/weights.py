"""Which weights an attribution moves: a parameter tree split in two by one pattern, and joined again."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import traverse_util

from attrib_jax.core.checks import check_choice

# One full-match pattern a subset over the '/'-joined parameter path (METHOD.md section 3). What it means depends on the
# architecture. In UNets and PixArt `attn1` is self-attention and `attn2` cross-attention; norms, proj_in/proj_out and
# feed-forward layers lie beside them, not below. A bias of all keys of a softmax (PixArt has them) changes no output:
# its gradient is rounding noise, and so is what divides it.
_NO_EFFECT = r"(?!.*\battn[12]/to_k/bias$)"
_LOW_RANK = r"(.+/)?lora_[AB]/kernel"
WEIGHT_SUBSETS = {
    "cross-attn-kv": _NO_EFFECT + r"(.+/)?attn2/to_[kv]/(kernel|bias)",
    "cross-attn": _NO_EFFECT + r"(.+/)?attn2/.+",
    "attn": _NO_EFFECT + r"(.+/)?attn[12]/.+",
    "mlp": r"(.+/)?ff/.+",
    # The low-rank factors of a LoRA that is kept apart from the kernels.
    "lora": _LOW_RANK,
    "all": _NO_EFFECT + r".+",
}
# In SD 3 and FLUX text and image attend to both in `attn`: the text's keys and values have projections of their own,
# but they are not functions of the text alone. `attn2` (SD 3.5 medium) is self-attention of the image, and in FLUX's
# single blocks text and image share all matrices. A table of positions is among the parameters, but is not trained.
_JOINT_SUBSETS = {
    "cross-attn-kv": r"transformer_blocks_\d+/attn/add_[kv]_proj/(kernel|bias)",
    "cross-attn": r"transformer_blocks_\d+/attn/.+",
    "attn": r"(single_)?transformer_blocks_\d+/attn2?/.+",
    "mlp": r"(single_)?transformer_blocks_\d+/(ff|ff_context|proj_mlp)/.+",
    "lora": _LOW_RANK,
    "all": r"(?!pos_embed/pos_embed$).+",
}
_JOINT_MARK = re.compile(r"(?:single_)?(transformer_blocks_\d+)/attn/(.+)")

Params = dict[str, Any]


class WeightCount(NamedTuple):
    """Number of leaves with two or more axes (`matrices`) and of numbers in all leaves (`values`)."""

    matrices: int
    values: int


def flatten_names(tree: Params) -> dict[str, Any]:
    """Nested dict -> flat dict with '/'-joined names, in the nested dict's order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten_names(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten_names`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def subset_patterns(names: Iterable[str]) -> dict[str, re.Pattern]:
    """Subset -> the pattern that its names match in full, for the architecture that has the parameters `names`."""
    leaves: dict[str, set[str]] = {}
    for found in filter(None, map(_JOINT_MARK.fullmatch, names)):
        leaves.setdefault(found[1], set()).add(found[2])
    if not leaves:
        return {subset: re.compile(text) for subset, text in WEIGHT_SUBSETS.items()}
    # The last block of SD 3 has queries of the text, but gives the text no output.
    without = (block for block, held in leaves.items() if "to_add_out/kernel" not in held)
    unused = f"(?!({'|'.join(without)})/attn/(add_q_proj|norm_added_q)/)"
    return {subset: re.compile(unused + text) for subset, text in _JOINT_SUBSETS.items()}


def select_weights(params: Params, subset: str) -> tuple[Params, Params]:
    """Splits `params` into the weights named by `subset` and the rest.

    Args:
      params: nested dict of arrays with diffusers' module names.
      subset: `cross-attn-kv` (projections to the keys and values of the text), `cross-attn` (every leaf of the layers
        that have them), `attn` (every leaf of all attention layers), `mlp` (every leaf of the feed-forward layers
        beside them), `lora` (the factors of a LoRA that is kept apart, see `attach_lora`), or `all`. Of SD 3 and FLUX
        the first two are those of blocks in which the text has projections of its own, and `all` leaves out the table
        of positions.

    Returns:
      `(selected, rest)`: nested dicts, each with its own leaves only.

    Raises:
      ValueError: `subset` is unknown; no parameter belongs to it; or the keys of a layer without its values do.
    """
    check_choice("weights", subset, WEIGHT_SUBSETS)
    flat = flatten_names(params)
    pattern = subset_patterns(flat)[subset]
    selected = {name: leaf for name, leaf in flat.items() if pattern.fullmatch(name)}
    rest = {name: leaf for name, leaf in flat.items() if name not in selected}
    if not selected:
        some = ", ".join(list(rest)[:3]) or "none at all"
        raise ValueError(
            f"weights={subset!r} selects no parameter: none of the {len(rest)} names matches {pattern.pattern!r} "
            f"(names seen: {some}). "
            + (
                "Give a model whose LoRA is kept apart (--lora)."
                if subset == "lora"
                else "Give the denoiser's own parameter tree, or another subset."
            )
        )
    single = sorted(name for name in selected if _other_projection(name) not in flat)
    if subset == "cross-attn-kv" and single:
        raise ValueError(
            f"weights={subset!r} selects keys without values, or values without keys: {', '.join(single[:3])}. Give "
            "the denoiser's own parameter tree, whose attention layers have both."
        )
    return unflatten_names(selected), unflatten_names(rest)


def _other_projection(name: str) -> str:
    """The name of a layer's values for that of its keys, and the reverse; other names as they are."""
    swapped = {"k": "v", "v": "k"}
    return re.sub(r"/(to|add)_([kv])(?=_proj/|/)", lambda match: f"/{match[1]}_{swapped[match[2]]}", name)


def merge_weights(selected: Params, rest: Params) -> Params:
    """Joins the two halves of `select_weights`; leaves pass through untouched, so it works under `jit` and `grad`.

    Raises:
      ValueError: a name is in both halves.
    """
    flat_selected, flat_rest = flatten_names(selected), flatten_names(rest)
    both = sorted(flat_selected.keys() & flat_rest.keys())
    if both:
        raise ValueError(
            f"selected and rest share {len(both)} parameters ({', '.join(both[:3])}); each must be in one half only. "
            "Pass the two halves that select_weights returned."
        )
    return unflatten_names({**flat_rest, **flat_selected})


def count_weights(tree: Params) -> WeightCount:
    """Counts the matrices and values of a parameter tree, for logs and for checking a selection."""
    leaves = flatten_names(tree).values()
    return WeightCount(
        matrices=sum(len(leaf.shape) >= 2 for leaf in leaves), values=sum(math.prod(leaf.shape) for leaf in leaves)
    )
