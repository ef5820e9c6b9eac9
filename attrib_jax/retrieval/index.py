"""An index answers in milliseconds which training images a query owes most to; two kinds behind one interface.

`student`: cosines of vectors that a student learned from a slow method's scores. `residual`: products of stored
residuals with the text kernel, exactly those of method `residual`, which need no training.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from attrib_jax.attribution.similarity import TextStatistics
from attrib_jax.core.durable import new_folder, remove_leftovers
from attrib_jax.core.types import Scores
from attrib_jax.data.protocol import named_groups
from attrib_jax.jobs.context import Run, dataset_fingerprints
from attrib_jax.jobs.encoded_dataset import CaptionRows
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods import residual
from attrib_jax.methods.base import QueryJob
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.retrieval.features import Features, StudentFeatureConfig
from attrib_jax.retrieval.student import StudentConfig, embed_images, embed_queries, load_student, save_student
from attrib_jax.retrieval.vectors import GRAPH_FROM, VectorIndex, write_vectors
from attrib_jax.storage.files import (
    DamagedFileError,
    StorageError,
    map_arrays,
    storage_errors,
    write_arrays,
    write_json,
)

FORMAT = 1
RECORD_FILE = "index.json"
_STUDENT_FILE, _QUERIES_FILE, _RESIDUALS_FILE = "student.safetensors", "queries.safetensors", "residuals.safetensors"


class IndexMismatchError(ValueError):
    """An index was made for another model, data set or tower than this run's."""


class Index(Protocol):
    """Training images by their influence on a query.

    Attributes:
      folder: where it is.
      record: what index.json says.
      row_ids: (N,) of the images that are in it.
    """

    folder: Path
    record: Mapping[str, Any]
    row_ids: np.ndarray

    def search(
        self, run: Run, queries: Sequence[PreparedQuery], k: int | None = None, exact: bool = False
    ) -> list[Scores]:
        """Scores of at least the `k` best images for each query, of all images if None; `exact` passes no graph."""
        ...

    def add(self, run: Run, graph_from: int = GRAPH_FROM) -> "Index":
        """The index with the images of `run`'s data set too, in the same folder; nothing is trained."""
        ...

    def remove(self, row_ids: np.ndarray, graph_from: int = GRAPH_FROM) -> "Index":
        """The index without these images, in the same folder; KeyError for one that is not in it."""
        ...


class LearnedQueries(NamedTuple):
    """The queries that a student was trained on, for the reverse question: vectors (Q, dim), prompts and latents."""

    vectors: np.ndarray
    prompts: list[str]
    latents: np.ndarray


class StudentIndex:
    """Kind `student`, see `Index`."""

    def __init__(self, folder: Path, record: Mapping[str, Any], tower: str | None = None):
        self.folder, self.record = Path(folder), record
        self.params, self.config, self.width = load_student(self.folder / _STUDENT_FILE)
        self.vectors = VectorIndex(self.folder, record["graph"])
        self.row_ids = self.vectors.row_ids
        names = tuple(record["features"]["student_features"])
        self.feature_config = StudentFeatureConfig(tower=tower or record["tower_path"], student_features=names)
        self._tower: Features | None = None
        self._given = tower

    @property
    def features(self) -> Features:
        """The features of the student's tower, loaded when they are first needed.

        Raises IndexMismatchError where the tower is another one, FileNotFoundError where it is not there.
        """
        if self._tower is None:
            found = Features(self.feature_config, self.record["latent_channels"])
            if found.fingerprint != self.record["tower"]:
                raise IndexMismatchError(
                    f"tower is {self.feature_config.tower!r} with the fingerprint {found.fingerprint[:12]}, which does "
                    f"not fit the index {os.fspath(self.folder)!r}: expected {self.record['tower'][:12]}, first found "
                    f"at {self.record['tower_path']!r}. Give that tower with --tower."
                )
            if found.width != self.width:
                raise IndexMismatchError(
                    f"tower is {self.feature_config.tower!r} with features of width {found.width}, and the student of "
                    f"{os.fspath(self.folder)!r} expected {self.width}. Make the index anew."
                )
            self._tower = found
        return self._tower

    def embed(self, queries: Sequence[PreparedQuery]) -> np.ndarray:
        """Vectors (Q, dim) float32 of queries."""
        return embed_queries(self.params, self.config, self.features.of_queries(queries))

    def search(self, run, queries, k=None, exact=False):
        del run
        return [self.vectors.search(vector, k, exact) for vector in self.embed(queries)]

    def reverse(self, row_id: int, k: int) -> list[tuple[str, float, np.ndarray]]:
        """The reverse question: of the queries that the student learned from, those that owe an image most.

        Returns (prompt, cosine, latents) of the `k` best; KeyError where the image is not in the index.
        """
        asked = self.learned_queries()
        products = asked.vectors @ self.vectors.vector(row_id)
        best = np.lexsort((np.arange(len(products)), -products))[:k]
        return [(asked.prompts[place], float(products[place]), asked.latents[place]) for place in best]

    def learned_queries(self) -> LearnedQueries:
        """The queries that it was trained on."""
        arrays, header = map_arrays(self.folder / _QUERIES_FILE)
        return LearnedQueries(np.asarray(arrays["vector"], np.float32), header["prompts"], arrays["latents"])

    def add(self, run, graph_from=GRAPH_FROM):
        row_ids, found = self.features.of_dataset(run)
        vectors = embed_images(self.params, self.config, found)
        kept = ~np.isin(self.row_ids, row_ids)
        return self._replace(
            np.concatenate([self.row_ids[kept], row_ids]),
            np.concatenate([np.asarray(self.vectors.vectors)[kept], vectors.astype(np.float16)]),
            graph_from,
        )

    def remove(self, row_ids, graph_from=GRAPH_FROM):
        self.vectors.places(np.asarray(row_ids))
        kept = ~np.isin(self.row_ids, row_ids)
        return self._replace(self.row_ids[kept], np.asarray(self.vectors.vectors)[kept], graph_from)

    def _replace(self, row_ids: np.ndarray, vectors: np.ndarray, graph_from: int) -> "StudentIndex":
        arrays, header = map_arrays(self.folder / _QUERIES_FILE)

        def fill(folder: Path) -> dict[str, Any]:
            save_student(folder / _STUDENT_FILE, self.params, self.config, self.width)
            write_arrays(folder / _QUERIES_FILE, {name: np.asarray(array) for name, array in arrays.items()}, header)
            return {"graph": write_vectors(folder, row_ids, vectors, graph_from, self.vectors)}

        _write(self.folder, {**self.record, "vectors": len(row_ids)}, fill)
        return StudentIndex(self.folder, _read_record(self.folder), self._given)


class ResidualIndex:
    """Kind `residual`, see `Index`."""

    def __init__(self, folder: Path, record: Mapping[str, Any]):
        self.folder, self.record = Path(folder), record
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record["method"].items()
        }
        self.config = residual.ResidualConfig(**settings)
        self._arrays, _ = map_arrays(self.folder / _RESIDUALS_FILE)
        self.row_ids = np.asarray(self._arrays["row_id"])
        statistics = TextStatistics(
            self._arrays["pooled"], np.asarray(self._arrays["distance"])[0], np.asarray(self._arrays["moment"])
        )
        image = np.asarray(self._arrays["image"])
        captions = CaptionRows(image, np.zeros_like(image), np.zeros_like(image))
        self._shared = residual.Prepared(captions, self._arrays["residual"], statistics, None)

    def search(self, run, queries, k=None, exact=False):
        del exact  # every search is
        jobs = [QueryJob(f"query {place}", {}, query, self.folder) for place, query in enumerate(queries)]
        found = residual.score_prepared(run, jobs, self.config, self._shared, self.row_ids)
        return [each.scores if k is None else each.scores.top(k) for each in found]

    def add(self, run, graph_from=GRAPH_FROM):
        del graph_from
        new = _residual_arrays(run, self.config)
        kept = self._without(np.asarray(run.data.row_ids))
        merged = {name: np.concatenate([kept[name], new[name]]) for name in ("row_id", "residual", "pooled")}
        merged["image"] = np.concatenate([kept["image"], new["image"] + len(kept["row_id"])])
        return self._replace(merged)

    def remove(self, row_ids, graph_from=GRAPH_FROM):
        del graph_from
        missing = np.setdiff1d(row_ids, self.row_ids)
        if len(missing):
            raise KeyError(f"row_id {int(missing[0])} is not among the {len(self.row_ids)} images of the index")
        return self._replace(self._without(np.asarray(row_ids)))

    def _without(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
        kept = ~np.isin(self.row_ids, row_ids)
        image = np.asarray(self._arrays["image"])
        of = kept[image]
        found = {name: np.asarray(self._arrays[name])[of] for name in ("residual", "pooled")}
        return {"row_id": self.row_ids[kept], "image": (np.cumsum(kept) - 1)[image[of]], **found}

    def _replace(self, arrays: dict[str, np.ndarray]) -> "ResidualIndex":
        # The width of the text kernel stays that of the first images, so that scores of the others do not change.
        fixed = {name: np.asarray(self._arrays[name]) for name in ("distance", "moment")}

        def fill(folder: Path) -> dict[str, Any]:
            write_arrays(folder / _RESIDUALS_FILE, {**arrays, **fixed}, {})
            return {}

        _write(self.folder, {**self.record, "vectors": len(arrays["row_id"])}, fill)
        return ResidualIndex(self.folder, _read_record(self.folder))


def write_student_index(
    folder: str | os.PathLike,
    run: Run,
    features: Features,
    params: Any,
    config: StudentConfig,
    queries: LearnedQueries,
    record: Mapping[str, Any],
    graph_from: int = GRAPH_FROM,
) -> StudentIndex:
    """Embeds the data set of `run` and writes an index, in the place of one that was there.

    Args:
      folder: of the index.
      run: model and data set.
      features: of the student.
      params, config: the student.
      queries: what it was trained on; their vectors are computed here, from features, where they are (Q, F).
      record: further JSON values for index.json, such as the teacher's settings and the held-out mAP.
      graph_from: images from which on a graph is made.
    """
    row_ids, found = features.of_dataset(run)
    with run.timed("embed"):
        vectors = embed_images(params, config, found)
        asked = {
            "vector": embed_queries(params, config, queries.vectors).astype(np.float16),
            "latents": np.asarray(queries.latents).astype(np.float16),
        }

    def fill(folder: Path) -> dict[str, Any]:
        save_student(folder / _STUDENT_FILE, params, config, features.width)
        write_arrays(folder / _QUERIES_FILE, asked, {"prompts": queries.prompts})
        return {"graph": write_vectors(folder, row_ids, vectors, graph_from)}

    own = {
        "tower": features.fingerprint,
        "tower_path": features.path,
        "features": {"student_features": list(features.names)},
        "latent_channels": int(run.data.latent_shape[-1]),
    }
    run_on_host0(lambda: _write(Path(folder), {**_shared_record("student", run, len(row_ids)), **own, **record}, fill))
    return StudentIndex(Path(folder), _read_record(Path(folder)))


def write_residual_index(
    folder: str | os.PathLike, run: Run, config: residual.ResidualConfig, record: Mapping[str, Any]
) -> ResidualIndex:
    """Computes the residuals of the data set of `run` and writes an index, in the place of one that was there.

    Raises ValueError for text kernels that read the captions' words or tokens, which an index does not hold.
    """
    wrong = set(config.text_kernel) - {"gaussian", "none"}
    if wrong:
        raise ValueError(
            f"text_kernel is {config.text_kernel}: an index keeps pooled text states alone and expected gaussian or "
            f"none. Leave out {', '.join(sorted(wrong))}."
        )
    arrays = _residual_arrays(run, config)

    def fill(folder: Path) -> dict[str, Any]:
        write_arrays(folder / _RESIDUALS_FILE, arrays, {})
        return {}

    described = {**_shared_record("residual", run, len(run.data)), "method": config.describe(), **record}
    run_on_host0(lambda: _write(Path(folder), described, fill))
    return ResidualIndex(Path(folder), _read_record(Path(folder)))


def _residual_arrays(run: Run, config: residual.ResidualConfig) -> dict[str, np.ndarray]:
    found = residual.prepare(run, config)
    count, width = len(found.captions.image), run.data.text_shape[1]
    text = found.statistics
    return {
        "row_id": np.asarray(run.data.row_ids, np.int32),
        "image": np.asarray(found.captions.image, np.int32),
        "residual": np.asarray(found.residuals[:]),
        "pooled": np.zeros((count, 0), np.float32) if text is None else np.asarray(text.pooled),
        "distance": np.zeros(1) if text is None else np.asarray(text.distance, np.float64).reshape(1),
        "moment": np.zeros((width, width)) if text is None else np.asarray(text.moment),
    }


def open_index(folder: str | os.PathLike, tower: str | None = None) -> StudentIndex | ResidualIndex:
    """Opens an index to search in; its vectors are memory-mapped.

    Args:
      folder: that `launch.index` wrote.
      tower: where the student's tower is, if not where it was when the index was made.

    Raises:
      FileNotFoundError: there is no index.
      DamagedFileError: a file is truncated or changed.
      StorageError: it is of a newer format.
    """
    folder = Path(folder)
    record = _read_record(folder)
    try:
        return ResidualIndex(folder, record) if record["kind"] == "residual" else StudentIndex(folder, record, tower)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{folder} lacks a file of its index ({error}). Make the index anew.") from error
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{folder / RECORD_FILE} is damaged ({error!r}). Make the index anew.") from error


def check_index(index: Index, run: Run, dataset: bool = True) -> None:
    """Raises IndexMismatchError where an index was made for another model or, with `dataset`, another data set."""
    expected = {"model": run.inputs["model"]}
    if dataset:
        expected |= {"encoding": run.inputs["encoding"], **dataset_fingerprints(run)}
    names = {"model": "--model", "dataset": "--dataset", "encoding": "the flags of encoding", "images": "--images"}
    for name, value in expected.items():
        found = index.record["inputs"].get(name)
        if found != value:
            shown = [str(each)[:12] for each in (found, value)]
            raise IndexMismatchError(
                f"index is {os.fspath(index.folder)!r}, which was made for another {name} (fingerprint {shown[0]}, "
                f"expected {shown[1]} as the {name} of this run). Give its {names.get(name, name)}, or make an index "
                "with launch.index; one of a data set that has grown or shrunk is brought up to date by "
                "launch.index --refresh."
            )


def update_index(index: Any, run: Run, run_of: Any, graph_from: int = GRAPH_FROM) -> tuple[Any, int, int]:
    """Brings an index up to a data set that has grown or shrunk -> the index, images added, images removed.

    Images are told apart by row id. The student, or the width of the text kernel, stays as it is.

    Args:
      index: see `open_index`.
      run: the data set as it is now.
      run_of: positions -> a `Run` of these images of the data set alone, under their row ids.
      graph_from: images from which on a graph is made.
    """
    check_index(index, run, dataset=False)
    now = np.asarray(run.dataset.row_ids)
    gone, new = np.setdiff1d(index.row_ids, now), np.flatnonzero(~np.isin(now, index.row_ids))
    if len(gone):
        index = index.remove(gone, graph_from)
    before = len(index.row_ids)
    if len(new):
        index = index.add(run_of(new), graph_from)
    record = {**_read_record(index.folder), "inputs": {**run.inputs, **dataset_fingerprints(run)}}
    run_on_host0(lambda: write_json(index.folder / RECORD_FILE, record))
    tower = getattr(index, "_given", None)
    return open_index(index.folder, tower), len(index.row_ids) - before, len(gone)


def _shared_record(kind: str, run: Run, count: int) -> dict[str, Any]:
    inputs = {**run.inputs, **dataset_fingerprints(run)}
    return {"format": FORMAT, "kind": kind, "inputs": inputs, "dataset_name": run.dataset.name, "vectors": count}


def _write(folder: Path, record: Mapping[str, Any], fill: Any) -> None:
    """Replaces the folder by one that `fill(folder)` filled, which returns further values for index.json."""
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file():
        raise StorageError(
            f"{folder} holds files but no {RECORD_FILE}, so it is no index. Give another folder, or move it away."
        )
    remove_leftovers(folder)
    with storage_errors(folder), new_folder(folder) as fresh:
        fresh.mkdir()
        own = fill(fresh)
        write_json(fresh / RECORD_FILE, {**record, **own})


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"index is {os.fspath(folder)!r}, which has no {RECORD_FILE}; make one with launch.index"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        number, kind = record["format"], record["kind"]
        inputs = record["inputs"]
        whole = isinstance(inputs, dict) and kind in ("student", "residual") and isinstance(number, int)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedFileError(f"{file} is damaged or half-written. Make the index anew, or restore the file.")
    if number > FORMAT:
        raise StorageError(
            f"{file} has format {number}, this version reads up to {FORMAT}: use the version that wrote it or a newer"
        )
    return record


def describe_index(index: Index) -> dict[str, Any]:
    """What a page or a report says of an index."""
    record = index.record
    known = {name: record[name] for name in ("kind", "vectors", "dataset_name") if name in record}
    return known | {name: record[name] for name in ("held_out", "teacher") if name in record}


@dataclasses.dataclass(frozen=True)
class SubsetDataset:
    """Some rows of a data set, under their own row ids, as `Dataset`."""

    whole: Any
    positions: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "positions", np.asarray(self.positions))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.positions[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.whole.captions(int(self.positions[index]))

    def fingerprint(self) -> str:
        from attrib_jax.core.fingerprint import digest

        return digest([self.whole.fingerprint(), np.asarray(self.positions, "<i8")])

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def row_ids(self) -> np.ndarray:
        return np.asarray(self.whole.row_ids)[self.positions]

    @property
    def groups(self) -> np.ndarray | None:
        return None if self.whole.groups is None else np.asarray(self.whole.groups)[self.positions]

    @property
    def group_names(self) -> list[str] | None:
        names = named_groups(self.whole)
        return None if names is None else [names[place] for place in self.positions.tolist()]

    @property
    def credit(self) -> str | None:
        return self.whole.credit

    @property
    def credit_url(self) -> str | None:
        return self.whole.credit_url
