"""Argument checks before tracing: each error names the argument, its value, what was expected and what to do."""

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LISTED = 20  # names shown of each kind of problem


def check_range(name: str, value: float, low: float = -math.inf, high: float = math.inf, integer: bool = False) -> None:
    """Raises ValueError unless `low <= value <= high`, and `value` is a whole number where `integer` is set."""
    kind = numbers.Integral if integer else numbers.Real
    # bool is an int to Python, but True as a step size is a slip. NaN fails both comparisons.
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind) or not low <= value <= high:
        noun = "a whole number" if integer else "a number"
        if low > -math.inf and high < math.inf:
            noun += f" from {low} to {high}"
        elif low > -math.inf:
            noun += f" of at least {low}"
        elif high < math.inf:
            noun += f" of at most {high}"
        raise ValueError(f"{name} is {value!r}: expected {noun}. Change {name}.")


def check_positive(name: str, value: float, integer: bool = False) -> None:
    """Raises ValueError unless `value` is finite and greater than 0, and a whole number where `integer` is set."""
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind) or not 0 < value < math.inf:
        noun = "whole number" if integer else "finite number"
        raise ValueError(f"{name} is {value!r}: expected a {noun} greater than 0. Change {name}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`, suggesting the nearest one and listing all."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {name} {value!r}: {hint}Known: {', '.join(choices)}.")


def check_finite(name: str, tree: Any) -> None:
    """Raises ValueError naming the leaves of `tree` that hold NaN or infinity, and how many such values each has.

    Runs on concrete arrays, on the host: not inside `jit`.
    """
    wrong = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        values = np.asarray(leaf)
        if values.dtype.kind in "biuSU":
            continue
        count = int(values.size - np.count_nonzero(np.isfinite(values)))
        if count:
            leaf_name = jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
            wrong.append(f"{leaf_name} ({count} of {values.size})")
    if wrong:
        raise ValueError(
            f"{name} has values that are NaN or infinite: {', '.join(wrong)}. The file is damaged or the computation "
            "diverged: load another copy, or repeat it with a smaller step."
        )


def nonfinite_rows(values: np.ndarray) -> np.ndarray:
    """Indices of the rows of `values` (N, ...) that hold NaN or infinity, in order."""
    values = np.asarray(values)
    return np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))


def example_mask(mask: Any, batch: Any) -> jax.Array:
    """`mask` of a batch of B examples as (B,) bool, all of them examples if None.

    Raises ValueError unless `mask` is (B,) and every array of `batch` has a leading axis B.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    sizes |= set() if mask is None else {np.shape(mask)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"batch and mask must share one leading axis, but theirs are {sorted(sizes)}; expected (B,) of every one"
        )
    ((size,),) = sizes
    return jnp.ones((size,), bool) if mask is None else jnp.asarray(mask).astype(bool)


def raise_problems(summary: str, problems: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError that lists the names of every kind of problem that has any; returns if none has."""
    parts = []
    for kind, names in problems.items():
        names = sorted(names)
        if names:
            more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
            parts.append("\n  ".join([f"{len(names)} {kind}:", *names[:_LISTED], *more]))
    if parts:
        raise ValueError("\n".join([summary, *parts]))


def expand_path(path: str | os.PathLike) -> str:
    """`path` with a leading `~` or `~user` replaced by that home folder, which no shell does within `--flag=~/x`.

    Raises ValueError where there is no such user, since a folder `~user` would be made, and where the path is empty or
    holds a NUL.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if not text or "\0" in text:
        raise ValueError(f"path is {text!r}; expected the name of a file or folder")
    if expanded.startswith("~"):
        raise ValueError(f"path is {text!r}: there is no such user; write ./{text} for a folder of that name")
    return expanded
