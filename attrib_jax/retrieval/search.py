"""Searching an index as if it were a method: the same query folders, files and report as `launch.attribute` makes."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attrib_jax.core.checks import check_positive
from attrib_jax.core.fingerprint import files_digest
from attrib_jax.core.settings import setting
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery, read_region_mask
from attrib_jax.jobs.settings import RegionSettings
from attrib_jax.methods.base import Method, MethodConfig, QueryJob, Scored
from attrib_jax.methods.unlearn import UnlearnConfig, score_rows
from attrib_jax.retrieval.index import RECORD_FILE, Index, check_index
from attrib_jax.retrieval.vectors import recall

# Images that get a score where an index is too large to score all.
CANDIDATES = 1000


def _index_content(folder: str) -> str:
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors"))
    return files_digest(files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(MethodConfig, RegionSettings):
    """Settings of a search.

    Attributes:
      parts: the config of the exact method, where the best images are scored again by it.
    """

    method: str = setting("index", "Attribution method.", choices=("index",))
    index: str = setting("", "Folder of the index, that launch.index wrote.", path=True, content=_index_content)
    rerank: int = setting(
        0, "Number of images, the best by the index, that are scored again by unlearning; 0 leaves the index's scores.",
        low=0,
    )  # fmt: skip
    parts: tuple[MethodConfig, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.index or not (Path(self.index) / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"index is {self.index!r}: expected a folder with {RECORD_FILE}, that launch.index wrote"
            )
        if bool(self.rerank) != bool(self.parts):
            raise ValueError(
                f"rerank is {self.rerank} and parts holds {len(self.parts)} configs: expected the config of unlearning "
                "where images are scored again, and none where they are not."
            )

    @property
    def partial(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        """The settings that decide a result, with those of the exact method."""
        return super().describe() | ({"parts": [part.describe() for part in self.parts]} if self.parts else {})


def index_method(index: Index) -> Method:
    """An index as a method, for `attribute_queries`."""
    return Method(
        SearchConfig,
        lambda run, config: None,
        functools.partial(_score, index),
        "a search in an index",
        check=lambda run, config: check_index(index, run),
    )


def crop(query: PreparedQuery, region: tuple[int, int, int, int] | None) -> PreparedQuery:
    """The query with what is inside of a box x0, y0, x1, y1 as its image, enlarged to the whole; itself without one.

    Raises ValueError where the box does not lie in the image.
    """
    if region is None:
        return query
    height, width = query.image.shape[:2]
    x0, y0, x1, y1 = region
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"region is {region}: expected x0 < x1 and y0 < y1 inside the query of {width} x {height} pixels. Change "
            "region."
        )
    image = np.asarray(Image.fromarray(query.image[y0:y1, x0:x1]).resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = query.latents.shape[:2]
    picked = np.ix_(_places(y0, y1, height, rows), _places(x0, x1, width, columns))
    return dataclasses.replace(query, image=image, latents=query.latents[picked])


def _box(query: PreparedQuery, config: RegionSettings) -> tuple[int, int, int, int] | None:
    """The box of a region, or around its mask."""
    if config.region_mask is None:
        return config.region
    rows, columns = np.nonzero(read_region_mask(config.region_mask, query.image.shape[:2]))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _places(low: int, high: int, size: int, count: int) -> np.ndarray:
    """The cells, of `count` along a side of `size` pixels, that `count` points between two pixels fall into."""
    pixels = low + (np.arange(count) + 0.5) * (high - low) / count
    return np.minimum((pixels * count / size).astype(int), count - 1)


def _score(index: Index, run: Run, queries: Sequence[QueryJob], config: SearchConfig) -> list[Scored]:
    with run.timed("search"):
        asked = [crop(query.prepared, _box(query.prepared, config)) for query in queries]
        count = max(CANDIDATES, config.rerank)
        found = index.search(run, asked, count if len(index.row_ids) > 20 * CANDIDATES else None)
    if not config.rerank:
        return [Scored(scores) for scores in found]
    exact = config.parts[0]
    assert isinstance(exact, UnlearnConfig)
    places = {int(row): place for place, row in enumerate(run.data.row_ids)}
    rows = []
    for scores in found:
        best = scores.top(config.rerank).row_id
        rows.append(np.sort([places[int(row)] for row in best if int(row) in places]))
    return score_rows(run, queries, exact, rows)


def benchmark(index: Index, run: Run, queries: Sequence[PreparedQuery], count: int, k: int = 100) -> dict[str, Any]:
    """Latency of single queries, from image and prompt to the k best, and recall against brute force.

    Args:
      index, run: what is searched.
      queries: asked in turn.
      count: of measured searches.
      k: images asked for.

    Returns:
      `p50_ms`, `p99_ms` of whole searches; `search_p50_ms`, `search_p99_ms` without the query's features where the
      index has vectors; `recall` at k, `k` and the number of `vectors`.
    """
    check_positive("count", count, integer=True)
    k = min(k, len(index.row_ids))
    for query in queries[:3]:
        index.search(run, [query], k)
    whole, alone, found = [], [], {}
    for number in range(count):
        place = number % len(queries)
        began = time.perf_counter()
        (found[place],) = index.search(run, [queries[place]], k)
        whole.append(1000 * (time.perf_counter() - began))
    vectors = getattr(index, "vectors", None)
    if vectors is not None:
        embedded = index.embed(queries)  # type: ignore[attr-defined]
        for number in range(count):
            began = time.perf_counter()
            vectors.search(embedded[number % len(queries)], k)
            alone.append(1000 * (time.perf_counter() - began))
    exact = index.search(run, [queries[place] for place in found], k, exact=True)
    result: dict[str, Any] = {"p50_ms": _percentile(whole, 50), "p99_ms": _percentile(whole, 99)}
    if alone:
        result |= {"search_p50_ms": _percentile(alone, 50), "search_p99_ms": _percentile(alone, 99)}
    return result | {"recall": round(recall(list(found.values()), exact), 4), "k": k, "vectors": len(index.row_ids)}


def _percentile(times: Sequence[float], share: float) -> float:
    return round(float(np.percentile(times, share)), 3)
