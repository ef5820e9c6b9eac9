"""Which weights an attribution moves: a parameter tree split in two by one pattern, and joined again."""

import math
import re
from typing import Any, NamedTuple

from flax import traverse_util

from attrib_jax.core.checks import check_choice

# One full-match pattern a subset over the '/'-joined parameter path (METHOD.md section 3). `attn1` is self-attention,
# `attn2` cross-attention; norms, proj_in/proj_out and feed-forward layers lie beside them, not below.
WEIGHT_SUBSETS = {
    "cross-attn-kv": r"(.+/)?attn2/to_[kv]/(kernel|bias)",
    "cross-attn": r"(.+/)?attn2/.+",
    "attn": r"(.+/)?attn[12]/.+",
    "mlp": r"(.+/)?ff/.+",
    "all": r".+",
}

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


def select_weights(params: Params, subset: str) -> tuple[Params, Params]:
    """Splits `params` into the weights named by `subset` and the rest.

    Args:
      params: nested dict of arrays with diffusers' module names.
      subset: `cross-attn-kv` (key and value projections of the cross-attention layers), `cross-attn` (every leaf of
        those layers), `attn` (every leaf of the self- and cross-attention layers), `mlp` (every leaf of the
        feed-forward layers beside them), or `all`.

    Returns:
      `(selected, rest)`: nested dicts, each with its own leaves only; `rest` is empty for `all`.

    Raises:
      ValueError: `subset` is unknown, or no parameter belongs to it.
    """
    check_choice("weights", subset, WEIGHT_SUBSETS)
    pattern = re.compile(WEIGHT_SUBSETS[subset])
    selected: Params = {}
    rest: Params = {}
    for name, leaf in flatten_names(params).items():
        (selected if pattern.fullmatch(name) else rest)[name] = leaf
    if not selected:
        some = ", ".join(list(rest)[:3]) or "none at all"
        raise ValueError(
            f"weights={subset!r} selects no parameter: none of the {len(rest)} names matches {pattern.pattern!r} "
            f"(names seen: {some}). Give the UNet's own parameter tree, or another subset."
        )
    return unflatten_names(selected), unflatten_names(rest)


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
