"""What an attribution method is: a config of its own settings, and two functions."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(Settings):
    """Settings of a method; every method's config inherits from it, and from those of the jobs that it uses."""

    method: str = setting("unlearn", "Attribution method.")

    @property
    def parts(self) -> tuple["MethodConfig", ...]:
        """Configs of the methods that this one is made of; none for most."""
        return ()

    @property
    def partial(self) -> bool:
        """Whether images that are less promising than others have no score."""
        return bool(getattr(self, "cascade", 0))


def moved_weights(config: MethodConfig) -> set[str]:
    """The subsets of weights that a method selects, and the methods that it is made of."""
    return {each.weights for each in (config, *config.parts) if hasattr(each, "weights")}


class QueryJob(NamedTuple):
    """A query that a method scores.

    Attributes:
      name: name of the query's folder.
      settings: what decides its result, as JSON values.
      prepared: the query as the model sees it.
      folder: where the method may keep files of this query.
    """

    name: str
    settings: dict[str, Any]
    prepared: PreparedQuery
    folder: Path


class Scored(NamedTuple):
    """Result of a method for one query: the scores, and the query's loss before each unlearning step, if any."""

    scores: Scores
    query_loss: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """One finished attribution.

    Attributes:
      name: name of the query's folder.
      folder: where its files are.
      scores: scores of every training image; with a cascade, of its finalists alone.
      query_loss: the query's loss before each unlearning step; empty for methods without one.
      query: the query's image and model inputs.
      timings: stage -> (seconds, whether it was reused), of all queries that were attributed together.
      num_queries: how many queries that was.
    """

    name: str
    folder: Path
    scores: Scores
    query_loss: tuple[float, ...]
    query: PreparedQuery
    timings: dict[str, tuple[float, bool]]
    num_queries: int = 1


class Prepare(Protocol):
    """Computes or reads what all queries share and returns it; resumable."""

    def __call__(self, run: Run, config: Any) -> Any: ...


class Score(Protocol):
    """Scores queries over the run's data set -> one `Scored` for each, in order.

    It may keep files in the queries' folders and stages in `run.root`, and resumes from them; the caller stores what it
    returns.
    """

    def __call__(self, run: Run, queries: Sequence[QueryJob], config: Any) -> list[Scored]: ...


class Method(NamedTuple):
    """An entry of the registry.

    Attributes:
      config: the class of its settings.
      prepare, score: see `Prepare` and `Score`.
      summary: one sentence for `--help` and the docs.
      inputs: fingerprints, beside those of the settings, that decide its scores; those of the run if None.
      check: raises ValueError where the config does not fit the model or the data set; before any work.
    """

    config: type[MethodConfig]
    prepare: Prepare
    score: Score
    summary: str
    inputs: Callable[[Run], dict[str, str]] | None = None
    check: Callable[[Run, Any], None] | None = None
