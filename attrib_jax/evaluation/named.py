"""The methods and queries of a study: read from files, and their scores over the whole data set, computed once."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from attrib_jax.core.checks import check_choice
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.settings import Settings, declared, setting
from attrib_jax.core.text import read_text
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, check_query_name, prepare_query, query_settings
from attrib_jax.jobs.query_file import read_queries
from attrib_jax.jobs.settings import PassSettings
from attrib_jax.methods import METHODS, check_method, method_config, method_inputs, queries_per_pass, settings_of
from attrib_jax.methods.base import MethodConfig, QueryJob
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.files import make_folder, stored_arrays, write_arrays
from attrib_jax.storage.score_files import read_scores

# The entry of a methods file that has the library's default settings: others are compared with it.
DEFAULT = "default"
_SHARED, _STORED = "shared", "scores"
_FILE = "scores.safetensors"
SPLITS = ("tuning", "reported")


@dataclasses.dataclass(frozen=True)
class StoredScores:
    """Scores that were made elsewhere, a file for each query.

    Attributes:
      pattern: path of a query's file, of a format that `storage.score_files.read_scores` reads; `{split}`, `{number}`
        (its place in the split, from 0), `{prompt}` and `{seed}` in it stand for those of the query.
    """

    pattern: str

    def __post_init__(self):
        try:
            self.file("tuning", 0, Query(""))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"scores is {self.pattern!r}: expected a path with {{split}}, {{number}}, {{prompt}} or {{seed}} in it "
                f"and no other braces ({error})"
            ) from error

    def file(self, split: str, number: int, query: Query) -> str:
        """The path of one query's scores."""
        return self.pattern.format(split=split, number=number, prompt=query.prompt, seed=query.seed)

    def read(self, row_ids: np.ndarray, split: str, queries: Sequence[Query]) -> np.ndarray:
        """Scores (Q, N) float32 of the rows `row_ids` (N,).

        Raises FileNotFoundError for a query without a file, ValueError where a file does not hold every row.
        """
        found = []
        for number, query in enumerate(queries):
            file = self.file(split, number, query)
            scores = read_scores(file)
            missing = np.setdiff1d(row_ids, scores.row_id)
            if len(missing):
                raise ValueError(
                    f"{file} has no score of row {missing[0]} and {len(missing) - 1} more: expected every image of the "
                    "data set"
                )
            found.append(_in_order(scores, row_ids))
        return np.stack(found).astype(np.float32)


def read_methods(file: str | os.PathLike, only: Sequence[str] = ()) -> dict[str, MethodConfig | StoredScores]:
    """Method name -> its settings, from a JSON object of objects.

    Each holds settings of its method that differ from the defaults, and `method` where that is not the default one;
    those of the object `shared` go to every method that reads them. An object `{"scores": PATTERN}` is `StoredScores`,
    and one with the name `default` is empty.

    Args:
      file: such as `configs/evaluation/methods_digits.json`.
      only: names to take, in this order; all if empty.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not such an object, a method does not read a setting, or a name is unknown; says which.
    """
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"methods file {file} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise ValueError(f'methods file {file} is no object of objects; expected {{"unlearn": {{"step_size": 0.1}}}}')
    shared = content.pop(_SHARED, {})
    if not content:
        raise ValueError(f"methods file {file} names no method")
    for name in content:
        check_query_name(name)
    for name in only:
        check_choice("method", name, content)
    configs: dict[str, MethodConfig | StoredScores] = {}
    for name in only or content:
        own = content[name]
        if name == DEFAULT and own:
            raise ValueError(
                f"method {name!r} of {file} has the settings {own}: expected none, since this name is that of the "
                "library's defaults. Give it another name."
            )
        if _STORED in own:
            if len(own) > 1 or not isinstance(own[_STORED], str):
                raise ValueError(
                    f"method {name!r} of {file} is {own}: expected a path of scores alone, or settings of a method"
                )
            configs[name] = StoredScores(own[_STORED])
            continue
        method = own.get("method", "unlearn")
        try:
            check_choice("method", method, METHODS)
            for field in shared:
                check_choice(
                    "setting", field, sorted({field for each in METHODS.values() for field in declared(each.config)})
                )
            known = settings_of(method, own.get("ensemble_methods", ()))
            read = {field: value for field, value in shared.items() if field in known}
            configs[name] = method_config(**{"method": method, **read, **own})
        except (ValueError, TypeError) as error:
            raise ValueError(f"method {name!r} of {file}: {error}") from error
    return configs


def refuse_stored(methods: Mapping[str, MethodConfig | StoredScores], protocol: str) -> dict[str, MethodConfig]:
    """The methods of a protocol whose queries are no list in a file; ValueError for stored scores, which are of one."""
    configs = {name: each for name, each in methods.items() if not isinstance(each, StoredScores)}
    for name in methods.keys() - configs.keys():
        raise ValueError(
            f"method {name!r} is stored scores, of queries in a file: protocol {protocol!r} makes its own queries. "
            "Leave it out by --only, or choose protocol 'lds' or 'leave-k-out'."
        )
    return configs


def has_cascade(config: MethodConfig | StoredScores) -> TypeGuard[PassSettings]:
    """Whether a method gives full scores to some of the images only."""
    return isinstance(config, PassSettings) and config.cascade > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """Which queries a study reports."""

    split: str = setting(
        "reported", "Queries to report; settings are chosen on the tuning ones, never on the others.", choices=SPLITS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainedSettings(SplitSettings):
    """Which queries and models a study with retrained models has."""

    train_seeds: tuple[int, ...] = setting(
        (0,), "Seeds of trainings, over which what is measured is averaged.", low=0, high=2**32 - 1
    )

    def __post_init__(self):
        super().__post_init__()
        check_each_once("train_seeds", self.train_seeds)


def check_each_once(name: str, values: Sequence[Any]) -> None:
    """Raises ValueError for no values, or one that comes twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} is {values}: expected at least one value, and each once. Change {name}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryFiles(Settings):
    """The files of a study's queries."""

    tuning_queries: str | None = setting(
        None, "JSON Lines file of generated queries that settings are chosen on, as --queries of launch.attribute.",
        path=True,
    )  # fmt: skip
    reported_queries: str | None = setting(None, "JSON Lines file of other queries, which are reported.", path=True)

    def read(self, defaults: Query) -> "QuerySet":
        """The queries of both splits; what a line does not say is that of `defaults`.

        Raises ValueError where a query comes twice, besides what `read_queries` raises.
        """
        files = [file for file in (self.tuning_queries, self.reported_queries) if file is not None]
        read = [read_queries(file, defaults).queries for file in files]
        queries = tuple(query for each in read for query in each)
        seen = set()
        for query in queries:
            if (query.prompt, query.seed) in seen:
                raise ValueError(
                    f"query {query.prompt!r} with seed {query.seed} comes twice in {' and '.join(files)}: expected "
                    "each once. Leave one out."
                )
            seen.add((query.prompt, query.seed))
        return QuerySet(queries, 0 if self.tuning_queries is None else len(read[0]))


@dataclasses.dataclass(frozen=True)
class QuerySet:
    """The queries of a study.

    Attributes:
      queries: of both splits, the tuning ones first; what is measured is measured of all.
      num_tuning: how many are for choosing settings, never reported.
    """

    queries: tuple[Query, ...]
    num_tuning: int

    def split(self, name: str) -> np.ndarray:
        """The positions of one split's queries; ValueError where it has none."""
        check_choice("split", name, SPLITS)
        positions = np.arange(len(self.queries))
        positions = positions[: self.num_tuning] if name == "tuning" else positions[self.num_tuning :]
        if not len(positions):
            raise ValueError(f"split is {name!r}, but there are no {name} queries; give --{name}_queries")
        return positions

    def of(self, name: str) -> list[Query]:
        """The queries of one split."""
        return [self.queries[position] for position in self.split(name)]


def method_scores(
    run: Run, name: str, config: MethodConfig | StoredScores, queries: QuerySet, split: str
) -> np.ndarray:
    """The scores (Q, N) float32 of one method for one split, larger is more influential; columns as `run.data`.

    Kept in one small file, so that a study goes on where the attributions themselves are not at hand; its folder says
    the split.
    """
    asked = queries.of(split)
    if isinstance(config, StoredScores):
        return run_on_host0(lambda: config.read(run.data.row_ids, split, asked))
    return keep_scores(run, f"{split}/{name}", config, asked)


def keep_scores(run: Run, name: str, config: MethodConfig, queries: Sequence[Query]) -> np.ndarray:
    """The scores (Q, N) float32 of one method, kept in the stage `evaluation/scores/<name>-<digest>`."""
    settings = {"method": config.describe(), "queries": [query_settings(query) for query in queries]}
    inputs = method_inputs(run, config)
    with run.root.stage(f"evaluation/scores/{name}-{json_digest(settings)[:8]}", settings, inputs) as stage:
        file = stage.path / _FILE
        stored = run_on_host0(lambda: stored_arrays(file))
        if stored is not None:
            return stored["scores"]
        results = score_queries(run, config, queries, stage.path / "queries")
        scores = np.stack([_in_order(each, run.data.row_ids) for each in results]).astype(np.float32)
        run_on_host0(lambda: write_arrays(file, {"scores": scores}, {"method": name}))
        # What the method kept of each query: the scores say it all.
        run_on_host0(lambda: shutil.rmtree(stage.path / "queries", ignore_errors=True))
        return scores


def score_queries(run: Run, config: MethodConfig, queries: Sequence[Query], folder: Path) -> list[Scores]:
    """Scores of each query; the method keeps what it needs to resume in a folder for each below `folder`."""
    check_method(run, config)
    jobs = []
    for number, query in enumerate(queries):
        settings = {"query": query_settings(query), **config.describe()}
        place = make_folder(folder / f"{number}-{json_digest(settings)[:8]}")
        jobs.append(QueryJob(f"number {number}", settings, prepare_query(run.pipeline, run.predict, query), place))
    size, score = queries_per_pass(run, config), METHODS[config.method].score
    groups = (jobs[first : first + size] for first in range(0, len(jobs), size))
    return [scored.scores for group in groups for scored in score(run, group, config)]


def _in_order(scores: Any, rows: np.ndarray) -> np.ndarray:
    """Scores by the rows of the data set; a cascade's also-rans are below all of its finalists."""
    found = dict(zip(scores.row_id.tolist(), scores.score.tolist()))
    lowest = float(np.min(scores.score)) - 1.0
    return np.array([found.get(row, lowest) for row in rows.tolist()])
