"""Every attribution method by its name; each scores queries over the whole data set and returns the same `Scores`."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attrib_jax.core.types import Scores
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods.config import METHODS, AttributeConfig
from attrib_jax.methods.feature_settings import TOWER_METHODS
from attrib_jax.methods.gradient_settings import PROJECTED_METHODS
from attrib_jax.storage.stages import Stage

if TYPE_CHECKING:
    from attrib_jax.attribute import Attributor


class Job(NamedTuple):
    """A query on its way: the name and the open stage of its folder, what decides its result, and its inputs."""

    name: str
    settings: dict[str, Any]
    prepared: PreparedQuery
    stage: Stage

    @property
    def folder(self) -> Path:
        return self.stage.path


# A query's scores, and its losses before each unlearning step (none for methods that do not unlearn).
Scored = tuple[Scores, tuple[float, ...]]


def score(attributor: "Attributor", jobs: Sequence[Job], config: AttributeConfig) -> list[Scored]:
    """The results of `config.method` for every job, in their order.

    A method is a function of the same arguments. It may keep files in the jobs' folders and stages in
    `attributor.root`, and resumes from them; the caller stores what it returns.
    """
    module, function = _HOME[config.method].split(":")
    return getattr(importlib.import_module(module), function)(attributor, jobs, config)


def unlearning_scores(attributor: "Attributor", jobs: Sequence[Job], config: AttributeConfig) -> list[Scored]:
    """Each query is unlearned, then one pass over the data set gives the scores of all (METHOD.md sections 3, 4)."""
    _ = attributor.data  # encoded before F is fitted, so that each is timed by itself
    curvature = attributor.curvature(config)
    unlearned = []
    for job in jobs:
        try:
            unlearned.append(attributor.unlearned(job.folder, job.prepared, config, curvature))
        except ValueError as error:
            raise ValueError(f"query {job.name!r}: {error}") from error
    moved, losses = zip(*unlearned)
    return list(zip(attributor.scorer().scores([job.folder for job in jobs], moved, config), losses))


def random_scores(attributor: "Attributor", jobs: Sequence[Job], config: AttributeConfig) -> list[Scored]:
    """Uniform scores, a function of the query's settings and the row id alone: the floor that a method has to beat."""
    row_ids = attributor.dataset.row_ids

    def draw(settings: dict[str, Any]) -> np.ndarray:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
        return generator.random(int(row_ids.max()) + 1)[row_ids]

    return [(Scores(row_ids, draw(job.settings)), ()) for job in jobs]


_HOME = {
    "unlearn": f"{__name__}:unlearning_scores",
    "influence": "attrib_jax.methods.influence:influence_scores",
    "random": f"{__name__}:random_scores",
    **dict.fromkeys(PROJECTED_METHODS, "attrib_jax.methods.projected:projected_scores"),
    "pixel": "attrib_jax.methods.pixel:pixel_scores",
    **dict.fromkeys(TOWER_METHODS, "attrib_jax.methods.features:feature_scores"),
}
assert _HOME.keys() == set(METHODS)
