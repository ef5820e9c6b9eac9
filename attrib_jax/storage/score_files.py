"""Scores as files: the scores.npz of a finished query, tables for other programs (csv, parquet), and back."""

import csv
import dataclasses
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.core.checks import check_choice
from attrib_jax.core.types import Scores
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.files import DamagedFileError, atomic_write, read_arrays, write_bytes, write_npz

_log = logging.getLogger(__name__)

SCORE_SUFFIXES = (".csv", ".npz", ".parquet")

_FIELDS = tuple(field.name for field in dataclasses.fields(Scores))
_LOSSES = ("loss_before", "loss_after")
_WHOLE = ("row_id", "flip")
_QUERY_LOSS = "query_loss"
_MAX_ARRAY_BYTES = 2**34


def write_scores(
    scores: Scores,
    path: str | os.PathLike,
    captions: Callable[[int], str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes scores in the format of the file's suffix; the file takes its name only when it is complete.

    `.csv` and `.parquet` are tables by rank: rank (1 is the most influential), row_id, score, then what the scores
    have of flip, loss_before_0, loss_before_1 (the mirror image's), loss_after_0 and loss_after_1, and caption. `.npz`
    has the arrays of `Scores` in their own order and no captions. All three keep every digit; csv loses the dtypes.

    Args:
      scores: scores of N images.
      path: output file.
      captions: row id -> caption, for the tables.
      metadata: JSON values such as method and query, kept in a parquet file under the key `attrib_jax`.

    Raises:
      ValueError: the suffix is not one of `SCORE_SUFFIXES`, or pyarrow is not installed (parquet).
      StorageError: the file cannot be written.
    """
    path = Path(path)
    check_choice("score file type", path.suffix, SCORE_SUFFIXES)
    if path.suffix == ".npz":
        write_npz(path, _present(scores))
        return
    columns = _columns(scores.top())
    if captions is not None:
        columns["caption"] = [captions(row) for row in columns["row_id"].tolist()]
    if path.suffix == ".csv":
        write_bytes(path, _csv(columns))
        return
    arrow, parquet = _pyarrow(path)
    table = arrow.table(columns).replace_schema_metadata({"attrib_jax": json.dumps(dict(metadata or {}))})
    with atomic_write(path) as file:
        parquet.write_table(table, file)


def read_scores(path: str | os.PathLike) -> Scores:
    """Reads scores: a folder that `launch.attribute` wrote, a file of `write_scores`, or an `influence*.pkl`.

    Raises:
      FileNotFoundError: there is no such file, or the folder has no scores.npz.
      ValueError: the file is damaged or does not hold scores, its suffix is another one, or pyarrow is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "scores.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{os.fspath(path)!r} does not exist; give a score file or the folder of a query")
    check_choice("score file type", path.suffix, (*SCORE_SUFFIXES, ".pkl"))
    if path.suffix == ".pkl":
        from attrib_jax.convert.published import read_influence

        return read_influence(path)
    return _scores(path, {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix](path))


def write_result(path: str | os.PathLike, scores: Scores, query_loss: Sequence[float]) -> None:
    """Writes the scores.npz of a finished query: the arrays of `Scores`, and the query's loss before each step."""
    write_npz(path, _present(scores) | {_QUERY_LOSS: np.array(query_loss)})


def read_result(path: str | os.PathLike) -> tuple[Scores, tuple[float, ...]] | None:
    """Scores and query losses that `write_result` stored, on all hosts; None, with a warning, where unusable."""

    def read() -> dict[str, np.ndarray] | None:
        try:
            arrays = _read_npz(Path(path))
            return _present(_scores(Path(path), arrays)) | {_QUERY_LOSS: arrays[_QUERY_LOSS]}
        except (ValueError, KeyError) as error:
            _log.warning("%s cannot be used (%s): it will be computed again", path, error)
            return None

    arrays = run_on_host0(read)
    if arrays is None:
        return None
    query_loss = tuple(arrays.pop(_QUERY_LOSS).tolist())
    return Scores(**arrays), query_loss


def read_unlearned(path: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """Weights after unlearning a query by name, and its losses before each step as `query_loss`, float64.

    Of a file whose header holds these losses; None, with a warning for a damaged file, where they have to be computed.
    """
    try:
        arrays, losses = read_arrays(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
        return None
    return {**arrays, "query_loss": np.asarray(losses, np.float64)}


def _present(scores: Scores) -> dict[str, np.ndarray]:
    arrays = {name: getattr(scores, name) for name in _FIELDS}
    return {name: array for name, array in arrays.items() if array is not None}


def _scores(path: Path, arrays: Mapping[str, np.ndarray]) -> Scores:
    """The scores among a file's arrays; ValueError where these are not scores."""
    arrays = {name: array for name, array in arrays.items() if name in _FIELDS}
    missing = [name for name in ("row_id", "score") if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}; it holds: {', '.join(arrays) or 'nothing'}")
    for name, array in arrays.items():
        axes = 2 if name in _LOSSES else 1
        if array.ndim != axes or array.dtype.kind not in ("iu" if name in _WHOLE else "fiu"):
            raise ValueError(
                f"{path}: {name} has shape {array.shape} and type {array.dtype}; expected {axes} axes of "
                f"{'integers' if name in _WHOLE else 'numbers'}"
            )
    try:
        return Scores(**arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _columns(scores: Scores) -> dict[str, Any]:
    columns = {"rank": np.arange(1, len(scores) + 1), "row_id": scores.row_id, "score": scores.score}
    if scores.flip is not None:
        columns["flip"] = scores.flip
    for name in _LOSSES:
        losses = getattr(scores, name)
        if losses is not None:
            columns |= {f"{name}_{flip}": losses[:, flip] for flip in range(losses.shape[1])}
    return columns


def _arrays(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_columns`; other columns are left out."""
    arrays = {name: columns[name] for name in ("row_id", "score", "flip") if name in columns}
    for name in _LOSSES:
        flips = [columns[f"{name}_{flip}"] for flip in range(2) if f"{name}_{flip}" in columns]
        if flips:
            arrays[name] = np.stack(flips, axis=1)
    return arrays


def _csv(columns: Mapping[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # Python's numbers, whose text is exact.
    writer.writerows(zip(*(x.tolist() if isinstance(x, np.ndarray) else x for x in columns.values())))
    return text.getvalue().encode()


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        names, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a csv file ({error})") from error
    # A file that was cut off ends within a row, perhaps within a number.
    if not text.endswith("\n") or any(len(row) != len(names) for row in rows):
        raise ValueError(f"{path} is truncated or damaged: a row does not end, or does not have {len(names)} fields")
    columns = {}
    for index, name in enumerate(names):
        if name in ("rank", "caption"):
            continue
        kind = int if name in _WHOLE else float
        try:
            columns[name] = np.array([kind(row[index]) for row in rows], np.int64 if kind is int else np.float64)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: column {name!r} has a row that is not such a number ({error})") from error
    return _arrays(columns)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > _MAX_ARRAY_BYTES:
                raise ValueError(f"it would unpack to {size} bytes")
            # numpy checks a member's checksum only where it reads the member to its end.
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name in (*_FIELDS, _QUERY_LOSS)}
    # A damaged archive fails in many ways, zlib's and the zip format's own among them.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not an npz file of scores ({error})") from error


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    arrow, parquet = _pyarrow(path)
    names = ("row_id", "score", "flip", *(f"{name}_{flip}" for name in _LOSSES for flip in range(2)))
    try:
        file = parquet.ParquetFile(path)
        table = file.read([name for name in names if name in file.schema_arrow.names])
        return _arrays({name: table[name].to_numpy() for name in table.column_names})
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a parquet file of scores ({error})") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow, or choose .csv or .npz") from error
    return pyarrow, pyarrow.parquet
