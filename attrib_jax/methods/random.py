"""Method `random`: uniform scores, the floor that every method has to beat."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.settings import NoiseSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomConfig(MethodConfig, NoiseSettings):
    """Settings of random scores: the seed alone."""

    method: str = setting("random", "Attribution method.", choices=("random",))


def prepare(run: Run, config: RandomConfig) -> None:
    """Nothing is shared."""


def score(run: Run, queries: Sequence[QueryJob], config: RandomConfig) -> list[Scored]:
    """Uniform scores in [0, 1), a function of the query's settings and the row id alone."""
    row_ids = run.dataset.row_ids
    scored = []
    for query in queries:
        key = np.frombuffer(bytes.fromhex(json_digest(query.settings))[:16], np.uint64)
        values = np.random.Generator(np.random.Philox(key=key)).random(int(row_ids.max()) + 1)
        scored.append(Scored(Scores(row_ids, values[row_ids])))
    return scored
