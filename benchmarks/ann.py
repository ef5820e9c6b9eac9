"""Nearest-neighbour libraries on synthetic vectors: recall against brute force, latency, build time and size.

python -m benchmarks.ann --sizes=4000,118287,1000000 --output=runs/ann.json

Vectors are a Gaussian mixture of 1,000 centres in 24 dimensions, mapped to `dim` with noise in all of them and scaled
to unit length, since embeddings of images fill few of their dimensions; a query is a vector of the same mixture.
Latency is that of single queries, one after another, k = 100. Needs usearch and faiss-cpu.
"""

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from attrib_jax.retrieval.vectors import VectorIndex, write_vectors
from launch import common

_SIZES = flags.DEFINE_list("sizes", ["4000", "118287", "1000000"], "Numbers of vectors.")
_DIM = flags.DEFINE_integer("dim", 128, "Dimension of the vectors.", lower_bound=2)
_QUERIES = flags.DEFINE_integer("queries", 200, "Queries of each measurement.", lower_bound=2)
_KINDS = flags.DEFINE_list("kinds", None, "Index kinds, all if not given.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the table.")
_K = 100
_INTRINSIC = 24


class Built(NamedTuple):
    """An index: `search(query (d,), k)` gives positions; `save(path)` writes a file, `load(path)` maps or reads it."""

    search: Callable[[np.ndarray, int], np.ndarray]
    save: Callable[[str], Any]
    load: Callable[[str], Callable[[np.ndarray, int], np.ndarray]]


def make_vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors (count, dim) float32; those of another seed are of the same mixture."""
    fixed = np.random.default_rng(0)
    centres = 1.5 * fixed.standard_normal((1000, _INTRINSIC), np.float32)
    spread = fixed.standard_normal((_INTRINSIC, dim), np.float32)
    rng = np.random.default_rng(seed + 1)
    vectors = np.empty((count, dim), np.float32)
    for first in range(0, count, 100_000):
        part = vectors[first : first + 100_000]
        place = (
            rng.standard_normal((len(part), _INTRINSIC), np.float32)
            + centres[rng.integers(len(centres), size=len(part))]
        )
        part[:] = place @ spread + rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def _numpy_float32(vectors: np.ndarray) -> Built:
    def search(query, k):
        products = vectors @ query
        best = np.argpartition(products, -k)[-k:]
        return best[np.argsort(-products[best])]

    def load(path):
        mapped = np.load(path, mmap_mode="r")

        def search(query, k):
            products = mapped @ query
            best = np.argpartition(products, -k)[-k:]
            return best[np.argsort(-products[best])]

        return search

    return Built(search, lambda path: _save_npy(path, vectors), load)


def _save_npy(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _usearch_exact(dtype: str) -> Callable[[np.ndarray], Built]:
    def build(vectors):
        from usearch.index import MetricKind, search

        stored = (np.rint(vectors * 127).astype(np.int8)) if dtype == "i8" else vectors.astype(np.float16)

        def over(stored):
            def run(query, k):
                asked = np.rint(query * 127).astype(np.int8) if dtype == "i8" else query.astype(np.float16)
                return search(stored, asked, k, MetricKind.Cos, exact=True).keys

            return run

        return Built(
            over(stored), lambda path: _save_npy(path, stored), lambda path: over(np.load(path, mmap_mode="r"))
        )

    return build


def _usearch_graph(
    dtype: str, connectivity: int = 16, add: int = 96, expansion: int = 256
) -> Callable[[np.ndarray], Built]:
    def build(vectors):
        from usearch.index import Index

        def make():
            return Index(
                ndim=vectors.shape[1], metric="ip" if dtype != "i8" else "cos", dtype=dtype,
                connectivity=connectivity, expansion_add=add, expansion_search=expansion,
            )  # fmt: skip

        index = make()
        index.add(np.arange(len(vectors)), vectors)

        def load(path):
            mapped = make()
            mapped.view(path)
            mapped.expansion_search = expansion
            return lambda query, k: mapped.search(query, k).keys

        return Built(lambda query, k: index.search(query, k).keys, index.save, load)

    return build


def _faiss(description: str, search_setting: dict[str, int]) -> Callable[[np.ndarray], Built]:
    def build(vectors):
        import faiss

        centroids = max(64, int(2 * np.sqrt(len(vectors))))
        index = faiss.index_factory(
            vectors.shape[1], description.format(centroids=centroids), faiss.METRIC_INNER_PRODUCT
        )
        if not index.is_trained:
            index.train(vectors[np.random.default_rng(1).permutation(len(vectors))[: 40 * centroids]])
        index.add(vectors)

        def tune(index):
            space = faiss.ParameterSpace()
            for name, value in search_setting.items():
                space.set_index_parameter(index, name, min(value, centroids))
            return lambda query, k: index.search(query[None], k)[1][0]

        return Built(
            tune(index),
            lambda path: faiss.write_index(index, path),
            lambda path: tune(faiss.read_index(path, faiss.IO_FLAG_MMAP)),
        )

    return build


def _ours(vectors: np.ndarray) -> Built:
    """What launch.search does: brute force below 20,000, beyond it usearch's graph, scores from the vectors."""
    folder = tempfile.mkdtemp()
    graph = write_vectors(folder, np.arange(len(vectors)), vectors)

    def over(folder):
        index = VectorIndex(folder, graph)
        return lambda query, k: index.search(query, k).row_id

    return Built(over(folder), lambda path: shutil.move(folder, path), over)


KINDS: dict[str, Callable[[np.ndarray], Built]] = {
    "attrib_jax": _ours,
    "numpy float32 exact": _numpy_float32,
    "usearch float16 exact": _usearch_exact("f16"),
    "usearch int8 exact": _usearch_exact("i8"),
    "usearch float16 graph": _usearch_graph("f16"),
    "usearch int8 graph": _usearch_graph("i8"),
    "faiss float16 exact": _faiss("SQfp16", {}),
    "faiss int8 exact": _faiss("SQ8", {}),
    "faiss float16 graph": _faiss("HNSW16_SQfp16", {"efSearch": 256}),
    "faiss int8 graph": _faiss("HNSW16_SQ8", {"efSearch": 256}),
    "faiss float16 lists": _faiss("IVF{centroids},SQfp16", {"nprobe": 64}),
}


def measure(kind: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """One row of the table: the index is built, written, and searched as it is read again."""
    k = truth.shape[1]
    began = time.monotonic()
    built = KINDS[kind](vectors)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "index")
        built.save(path)
        files = [path] if os.path.isfile(path) else [each.path for each in os.scandir(path)]
        size = sum(map(os.path.getsize, files))
        search = built.load(path)
        del built
        gc.collect()
        for query in queries[:5]:
            search(query, k)
        times, recalls = [], []
        for query, expected in zip(queries, truth):
            began = time.perf_counter()
            found = search(query, k)
            times.append(1000 * (time.perf_counter() - began))
            recalls.append(len(np.intersect1d(found, expected)) / k)
    return {
        "index": kind,
        "vectors": len(vectors),
        "dim": vectors.shape[1],
        "build_s": round(seconds, 2),
        "size_mb": round(size / 1e6, 1),
        "p50_ms": round(float(np.percentile(times, 50)), 3),
        "p99_ms": round(float(np.percentile(times, 99)), 3),
        f"recall@{k}": round(float(np.mean(recalls)), 4),
    }


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Positions (Q, k) of the k largest products, by brute force in float32."""
    found = []
    for query in queries:
        products = vectors @ query
        best = np.argpartition(products, -k)[-k:]
        found.append(best[np.argsort(-products[best])])
    return np.stack(found)


def main():
    rows = []
    for size in map(int, _SIZES.value):
        vectors = make_vectors(size, _DIM.value, 0)
        queries = make_vectors(_QUERIES.value, _DIM.value, 1)
        truth = nearest(vectors, queries, min(_K, size))
        for kind in _KINDS.value or KINDS:
            rows.append(measure(kind, vectors, queries, truth))
            print(json.dumps(rows[-1]), flush=True)
            if _OUTPUT.value is not None:
                Path(_OUTPUT.value).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.run(main, one_host=True)
