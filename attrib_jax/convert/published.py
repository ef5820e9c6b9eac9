"""The result files of the paper's published code."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.convert.weights.pickles import read_pickled_dict
from attrib_jax.convert.weights.torch_files import open_torch
from attrib_jax.core.types import Scores

_ZIP = b"PK\x03\x04"


def read_influence(path: str | os.PathLike) -> Scores:
    """Reads an `influence*.pkl` (METHOD.md section 9): the influence of N training images on one query.

    The file is a pickled dict, or one written by `torch.save`, of `influence` (N,), floats, and `rank` (N,), the rows
    by falling influence; each a list, a numpy array or a torch tensor. No code of the file runs.

    Returns:
      `Scores` whose row ids are the positions in `influence`, as stored. In files of the Customized-Model benchmark
      the exemplars come first: with E of them, rows 0 to E - 1 are exemplars and row E + i is image i of the LAION
      subset. E is not stored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, holds something else, asks for anything but plain data, or its `rank` is not
        the order of its `influence`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"result file {os.fspath(path)!r} does not exist; give an influence*.pkl")
    with open(path, "rb") as file:
        is_torch = file.read(len(_ZIP)) == _ZIP
    if is_torch:
        tensors, others = open_torch(path)
        content = {**others, **tensors}
    else:
        content = read_pickled_dict(path)
    missing = [name for name in ("influence", "rank") if name not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {' and '.join(missing)}; it holds: {', '.join(map(str, list(content)[:10])) or 'nothing'}. "
            "Expected a result of the published code with influence and rank"
        )
    influence = _numbers(path, "influence", content["influence"], "fiu")
    rank = _numbers(path, "rank", content["rank"], "iu")
    count = len(influence)
    if len(rank) != count or not np.array_equal(np.sort(rank), np.arange(count)):
        raise ValueError(
            f"{path}: rank holds {len(rank)} rows that are not 0 to {count - 1} once each, as many as influence has "
            "values; the file is damaged or was made of a part of the data set"
        )
    try:
        scores = Scores(np.arange(count), influence)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ordered = influence[rank]
    wrong = np.flatnonzero(ordered[1:] > ordered[:-1])
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"{path}: rank and influence disagree at {wrong.size} places: rank puts row {rank[first]} "
            f"({ordered[first]:g}) right before row {rank[first + 1]} ({ordered[first + 1]:g}), the first of them. "
            "Expected rows by falling influence"
        )
    return scores


def _numbers(path: Path, name: str, value: Any, kinds: str) -> np.ndarray:
    """A list, numpy array or tensor -> (N,) array of numbers; bfloat16 becomes float32."""
    wanted = "whole numbers" if kinds == "iu" else "numbers"
    if isinstance(value, list):
        # Checked one by one: a nested list of shared lists could make a huge array from a small file.
        strange = next((x for x in value if not isinstance(x, (int, float, np.integer, np.floating))), None)
        if strange is not None:
            raise ValueError(f"{path}: {name} holds a {type(strange).__name__}; expected a list of {wanted}")
    elif not hasattr(value, "shape"):
        raise ValueError(f"{path}: {name} is a {type(value).__name__}; expected a list or an array of {wanted}")
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.ndim != 1 or not array.size or array.dtype.kind not in kinds:
        raise ValueError(
            f"{path}: {name} has shape {array.shape} and type {array.dtype}; expected (N,) {wanted} with N >= 1"
        )
    return array
