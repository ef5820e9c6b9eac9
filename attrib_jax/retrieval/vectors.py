"""Vectors on disk and their nearest neighbours: exact for few, over a graph of usearch for many.

`vectors.safetensors` holds row ids and float16 vectors and is memory-mapped. From `GRAPH_FROM` vectors on,
`graph.usearch` is a navigable small-world graph whose keys are the row ids, mapped too. What a graph finds is scored
again from the vectors, so scores do not depend on whether there is one.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.core.checks import check_positive
from attrib_jax.core.types import Scores
from attrib_jax.storage.files import DamagedFileError, map_arrays, storage_errors, write_arrays

# Vectors from which on a graph is made: fewer are compared one by one in a millisecond or two (docs/PERFORMANCE.md).
GRAPH_FROM = 20_000
VECTORS_FILE, GRAPH_FILE = "vectors.safetensors", "graph.usearch"
# Neighbours a node, and candidates while a graph is made and searched.
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 16, 96, 256
_BLOCK = 65_536


class VectorIndex:
    """N vectors by row id, opened from a folder that `write_vectors` filled.

    Attributes:
      row_ids: (N,) int32.
      vectors: (N, d) float16, memory-mapped.
    """

    def __init__(self, folder: str | os.PathLike, graph: dict[str, int] | None = None):
        """Maps the vectors, and the graph where there is one.

        Args:
          folder: where the files are.
          graph: size and crc32 of the graph's file, as `write_vectors` returned them; None where there is none.

        Raises DamagedFileError for files that are truncated or changed, FileNotFoundError for missing ones.
        """
        self.folder = Path(folder)
        arrays, _ = map_arrays(self.folder / VECTORS_FILE)
        self.row_ids, self.vectors = np.asarray(arrays["row_id"]), arrays["vector"]
        self._order = np.argsort(self.row_ids)
        self._dense = None if graph is not None else np.asarray(self.vectors, np.float32)
        self._graph = None
        if graph is not None:
            _check_file(self.folder / GRAPH_FILE, graph)
            self._graph = _new_graph(self.vectors.shape[1])
            self._graph.view(os.fspath(self.folder / GRAPH_FILE))
            self._graph.expansion_search = _EXPANSION_SEARCH
            if len(self._graph) != len(self.row_ids):
                raise DamagedFileError(
                    f"{self.folder / GRAPH_FILE} has {len(self._graph)} vectors and {VECTORS_FILE} has "
                    f"{len(self.row_ids)}: expected as many. Make the index anew."
                )

    def __len__(self) -> int:
        return len(self.row_ids)

    def search(self, query: np.ndarray, k: int | None = None, exact: bool = False) -> Scores:
        """Products of a query (d,) with the `k` vectors that are nearest to it, best first; all N if None or k >= N.

        The scores are those of `exact` to the last bit; of many vectors, `exact` alone is certain to find all k.
        """
        if k is not None:
            check_positive("k", k, integer=True)
        query = np.asarray(query, np.float32)
        if self._graph is not None and k is not None and k < len(self) and not exact:
            found = self._graph.search(query, k).keys.astype(np.int64)
            places = np.sort(self.places(found))
            return Scores(self.row_ids[places], _products(self.vectors[places], query)).top()
        scores = np.concatenate(
            [_products(self._block(start), query) for start in range(0, len(self), _BLOCK)] or [np.zeros(0)]
        )
        if k is not None and k < len(self):
            # Ties at the border by rising row id, as `Scores.top` has them.
            border = np.partition(scores, len(scores) - k)[len(scores) - k]
            places = np.flatnonzero(scores >= border)
            return Scores(self.row_ids[places], scores[places]).top(k)
        return Scores(self.row_ids, scores)

    def vector(self, row_id: int) -> np.ndarray:
        """The vector (d,) float32 of one image; KeyError where it is not in the index."""
        return np.asarray(self.vectors[self.places(np.array([row_id]))[0]], np.float32)

    def places(self, row_ids: np.ndarray) -> np.ndarray:
        """Positions of images by row id; KeyError naming one that is not in the index."""
        found = np.searchsorted(self.row_ids[self._order], row_ids)
        places = self._order[np.minimum(found, len(self) - 1)] if len(self) else np.zeros(0, np.int64)
        wrong = np.asarray(row_ids)[self.row_ids[places] != row_ids] if len(self) else np.asarray(row_ids)
        if len(wrong):
            raise KeyError(f"row_id {int(wrong[0])} is not among the {len(self)} images of the index")
        return places

    def _block(self, start: int) -> np.ndarray:
        if self._dense is not None:
            return self._dense[start : start + _BLOCK]
        return np.asarray(self.vectors[start : start + _BLOCK])


def _products(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n, d) and (d,) -> (n,) float64, each product the same whichever others are computed."""
    # Not a product of matrices, whose last digits would depend on the number of rows.
    return np.einsum("nd,d->n", np.asarray(vectors, np.float32), query).astype(np.float64)


def write_vectors(
    folder: str | os.PathLike,
    row_ids: np.ndarray,
    vectors: np.ndarray,
    graph_from: int = GRAPH_FROM,
    previous: "VectorIndex | None" = None,
) -> dict[str, int] | None:
    """Writes vectors (N, d) by row id, and their graph where they are many -> what `VectorIndex` needs to check it.

    `previous` is an index that most of the vectors are already in: its graph is copied and changed, not made anew.

    Raises ValueError where row ids are repeated, or a vector is not finite in float16.
    """
    folder, row_ids = Path(folder), np.asarray(row_ids, np.int32)
    if len(np.unique(row_ids)) < len(row_ids):
        raise ValueError("row_ids has one id more than once; expected an id for each vector")
    with np.errstate(over="ignore"):
        vectors = np.asarray(vectors).astype(np.float16)
    if not np.isfinite(vectors).all():
        raise ValueError(f"vector of row_id {int(row_ids[~np.isfinite(vectors).all(1)][0])} is NaN or beyond float16")
    write_arrays(folder / VECTORS_FILE, {"row_id": row_ids, "vector": vectors}, {"dim": vectors.shape[1]})
    if len(row_ids) < graph_from:
        return None
    graph = _new_graph(vectors.shape[1])
    if previous is not None and previous._graph is not None:
        graph.load(os.fspath(previous.folder / GRAPH_FILE))
        same = np.isin(row_ids, previous.row_ids)
        changed = row_ids[same][(np.asarray(previous.vectors)[previous.places(row_ids[same])] != vectors[same]).any(1)]
        gone = np.union1d(np.setdiff1d(previous.row_ids, row_ids), changed)
        if len(gone):
            graph.remove(gone.astype(np.uint64))
        new = ~same | np.isin(row_ids, changed)
    else:
        new = np.ones(len(row_ids), bool)
    if new.any():
        graph.add(row_ids[new].astype(np.uint64), vectors[new])
    file = folder / GRAPH_FILE
    with storage_errors(file):
        graph.save(os.fspath(file))
    return _describe(file)


def _new_graph(dim: int) -> Any:
    try:
        from usearch.index import Index
    except ImportError as error:
        raise ValueError(
            f"an index of {GRAPH_FROM:,} vectors or more needs usearch, which is not installed: "
            "pip install -e '.[serve]'"
        ) from error
    return Index(
        ndim=dim, metric="ip", dtype="f16",
        connectivity=_CONNECTIVITY, expansion_add=_EXPANSION_ADD, expansion_search=_EXPANSION_SEARCH,
    )  # fmt: skip


def _describe(file: Path) -> dict[str, int]:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(2**24):
            value = zlib.crc32(block, value)
    return {"bytes": file.stat().st_size, "crc32": value}


def _check_file(file: Path, expected: dict[str, int]) -> None:
    found = _describe(file)
    if found != expected:
        raise DamagedFileError(
            f"{file} is truncated or damaged: it has {found['bytes']} bytes and crc32 {found['crc32']}, expected "
            f"{expected['bytes']} and {expected['crc32']}. Make the index anew, or restore the file."
        )


def recall(found: Sequence[Scores], exact: Sequence[Scores]) -> float:
    """Mean share of the exact neighbours that were found."""
    return float(np.mean([np.isin(best.row_id, own.row_id).mean() for own, best in zip(found, exact)]))
