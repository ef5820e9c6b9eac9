"""Method `ensemble`: the weighted sum of several methods' standardised scores.

Scores are summed and not ranks: how far an image stands out says more than its place. Each method is scored through the
registry, which gives its entries to `method`; so this module knows none of them.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from attrib_jax.attribution.scores import standardised_sum
from attrib_jax.core.checks import check_choice
from attrib_jax.core.settings import setting
from attrib_jax.jobs.context import Run
from attrib_jax.methods.base import Method, MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.files import make_folder
from attrib_jax.storage.score_files import read_result, write_result

_log = logging.getLogger(__name__)

NAME = "ensemble"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleConfig(MethodConfig):
    """Settings of an ensemble of methods; `method_config("ensemble", ...)` makes one with its parts.

    Attributes:
      parts: configs of the methods, in the order of `ensemble_methods`.
    """

    method: str = setting(NAME, "Attribution method.", choices=(NAME,))
    ensemble_methods: tuple[str, ...] = setting((), "Methods whose standardised scores are summed, at least two.")
    ensemble_weights: tuple[float, ...] = setting(
        (), "Weights of these methods in the sum; 1 for each if not given.", only_if="ensemble_methods"
    )
    parts: tuple[MethodConfig, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        names, weights = self.ensemble_methods, self.ensemble_weights
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"ensemble_methods is {list(names)}: expected two or more methods, each once. Change ensemble_methods."
            )
        if weights and len(weights) != len(names):
            raise ValueError(
                f"ensemble_weights is {list(weights)}: expected {len(names)} numbers, one for each of "
                f"{', '.join(names)}. Change ensemble_weights, or leave it out."
            )
        if tuple(part.method for part in self.parts) != names:
            raise ValueError(
                f"parts holds configs of {[part.method for part in self.parts]}: expected those of {list(names)}. "
                "Make the config by method_config."
            )
        for part in self.parts:
            if getattr(part, "cascade", 0):
                raise ValueError(
                    f"cascade is {part.cascade}: an ensemble expected {part.method}'s scores of every image, and a "
                    "cascade scores its finalists alone. Leave out cascade."
                )

    def describe(self) -> dict[str, Any]:
        """The settings that decide a result, with those of the parts."""
        return super().describe() | {"parts": [part.describe() for part in self.parts]}


def check_methods(names: Sequence[str], methods: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of an ensemble's methods; ValueError for one that is not known, or is an ensemble itself."""
    known = [name for name in methods if name != NAME]
    if isinstance(names, str):
        raise ValueError(f"ensemble_methods is {names!r}: expected several names. Change ensemble_methods.")
    for name in names:
        check_choice("method of ensemble_methods", name, known)
    return tuple(names)


def method(methods: Mapping[str, Method]) -> Method:
    """The registry's entry of the ensemble of its other entries."""
    return Method(
        EnsembleConfig,
        functools.partial(_prepare, methods),
        functools.partial(_score, methods),
        "a weighted sum of other methods' standardised scores",
    )


def _prepare(methods: Mapping[str, Method], run: Run, config: EnsembleConfig) -> list[Any]:
    return [methods[part.method].prepare(run, part) for part in config.parts]


def _score(
    methods: Mapping[str, Method], run: Run, queries: Sequence[QueryJob], config: EnsembleConfig
) -> list[Scored]:
    """Each method scores the queries as if alone; its result is kept in a folder of its name in the query's."""
    found: list[list[Scored]] = [[] for _ in queries]
    for part in config.parts:
        jobs = [_job(query, part) for query in queries]
        results: list[Any] = [read_result(job.folder / "scores.npz") if _stored(job) else None for job in jobs]
        pending = [place for place, result in enumerate(results) if result is None]
        if pending:
            for place, scored in zip(
                pending, methods[part.method].score(run, [jobs[place] for place in pending], part)
            ):
                run_on_host0(functools.partial(write_result, jobs[place].folder / "scores.npz", *scored))
                results[place] = tuple(scored)
        for each, result in zip(found, results):
            each.append(Scored(*result))
    weights = config.ensemble_weights or (1.0,) * len(config.parts)
    sums = []
    for query, parts in zip(queries, found):
        scores, constant = standardised_sum([part.scores for part in parts], weights)
        for place in constant:
            _log.warning("%s: %s gives every image one score", query.name, config.parts[place].method)
        sums.append(Scored(scores, next((part.query_loss for part in parts if part.query_loss), ())))
    return sums


def _job(query: QueryJob, part: MethodConfig) -> QueryJob:
    """The query as the part would have it alone, in a folder of its own."""
    folder = run_on_host0(lambda: str(make_folder(query.folder / "parts" / part.method)))
    settings = {"query": query.settings["query"], **part.describe()}
    return QueryJob(query.name, settings, query.prepared, type(query.folder)(folder))


def _stored(job: QueryJob) -> bool:
    return run_on_host0(lambda: (job.folder / "scores.npz").exists())
