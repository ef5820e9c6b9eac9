"""The main job: run the stages that are missing, unlearn the queries, score every training picture."""

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_finite, check_range
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import select_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC, RELATIVE_DAMPING
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs.base_losses import BaseLosses
from attrib_jax.jobs.ekfac import fit_ekfac
from attrib_jax.jobs.encode import EncodeConfig, encode, stage_names
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.fisher import fisher_file, fit_fisher, load_fisher
from attrib_jax.jobs.identity import check_query_name, model_fingerprint, query_name, query_settings
from attrib_jax.jobs.losses import LossProgram
from attrib_jax.jobs.programs import ScorePrograms
from attrib_jax.jobs.queries import queries_in_pass
from attrib_jax.jobs.query import PreparedQuery, Query, prepare_query
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.jobs.regions import query_mask
from attrib_jax.jobs.scoring import Scorer
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.feature_settings import SIMILARITIES
from attrib_jax.methods.features import picture_inputs
from attrib_jax.methods.registry import Job, score
from attrib_jax.methods.unlearn import unlearn_query
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.hosts import num_hosts, run_on_host0
from attrib_jax.storage.score_files import read_result, write_result
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Attributed:
    """One finished attribution.

    Attributes:
      name: of the query's folder.
      folder: where its files are.
      scores: of every training picture; with a cascade, of its finalists alone.
      query_loss: the query's loss before each unlearning step; empty for methods without one.
      query: picture and UNet inputs.
      timings: stage -> (seconds, whether it was reused), of all queries that were attributed together.
      together: how many queries that was.
    """

    name: str
    folder: Path
    scores: Scores
    query_loss: tuple[float, ...]
    query: PreparedQuery
    timings: dict[str, tuple[float, bool]]
    together: int = 1


def attribute(
    pipeline: Pipeline,
    dataset: Dataset,
    query: Query,
    config: AttributeConfig = AttributeConfig(),
    workdir: str | os.PathLike | None = None,
    shipped: str | os.PathLike | None = None,
    encode_config: EncodeConfig = EncodeConfig(),
) -> Scores:
    """Scores every picture of `dataset` by its influence on `query`.

    Args:
      pipeline: see `load_pipeline`.
      dataset: its training pictures, see `open_dataset`.
      query: a prompt to generate from, or a picture with its prompt.
      config: see `AttributeConfig`.
      workdir: keeps the stages for further queries; a temporary folder if None, on one host.
      shipped: folder of finished stages that came with the model, such as `models/openmoji/stages`.
      encode_config: how pictures and captions are encoded.

    Raises:
      ValueError: an argument is out of range.
      StorageError: the workdir holds stages of another model or data set, is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if workdir is None:
            if num_hosts() > 1:
                raise ValueError("workdir is None; several hosts need a folder that all of them share")
            workdir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(lock(workdir))
        attributor = Attributor(pipeline, dataset, StageRoot(workdir, shipped), encode_config)
        return attributor.attribute(query, config).scores


class Attributor:
    """A model, its training set and a workdir, ready for queries; hold the lock of the workdir while using it.

    Everything that does not depend on the query is loaded or computed once.
    """

    def __init__(
        self, pipeline: Pipeline, dataset: Dataset, root: StageRoot, encode_config: EncodeConfig = EncodeConfig()
    ):
        check_finite("model", pipeline.params)
        self.pipeline, self.dataset, self.root, self.encode_config = pipeline, dataset, root, encode_config
        self.predict = predictor(pipeline.unet)
        self.timings: dict[str, tuple[float, bool]] = {}
        self.inputs = {
            "model": model_fingerprint(pipeline),
            "dataset": dataset.fingerprint(),
            "encoding": encode_config.describe(),
        }
        root.claim(self.inputs)
        self._data: EncodedDataset | None = None
        self.programs = ScorePrograms(pipeline)
        self._base = BaseLosses(root, self.inputs, self.programs, lambda: self.data, self.timed)
        self.gradient_program = GradientProgram(self.predict, pipeline.schedule)

    @property
    def data(self) -> EncodedDataset:
        """The encoded data set, encoded or read when it is first needed."""
        if self._data is None:
            self.prepare()
        return self._data

    def prepare(self) -> None:
        """Encodes the data set, or reads it; ahead of other work it is timed by itself."""
        config = self.encode_config
        reused = all(self.root.is_finished(name, {}, self.inputs) for name in stage_names(self.dataset))
        with self.timed("encode", reused):
            self._data = encode(self.root, self.pipeline, self.inputs, self.dataset, config)

    def fisher(self, weights: str, samples: int, seed: int) -> Diagonal:
        """The diagonal Fisher information of a weight subset, fitted or reused."""
        selected, rest = select_weights(self.pipeline.params["unet"], weights)
        settings = {"weights": weights, "samples": samples, "seed": seed}
        stage = (f"fisher/{weights}-{samples}-seed{seed}", settings, self.inputs)
        data = self.data
        with self.timed("fisher", self.root.is_finished(*stage)), self.root.stage(*stage) as opened:
            return fit_fisher(opened.path, self.predict, self.pipeline.schedule, selected, rest, data, samples, seed)

    def ekfac(self, weights: str, samples: int, seed: int, relative_damping: float = RELATIVE_DAMPING) -> EKFAC:
        """EKFAC of a weight subset on the same draws, fitted or reused; `relative_damping` see there."""
        selected, rest = select_weights(self.pipeline.params["unet"], weights)
        settings = {"weights": weights, "samples": samples, "seed": seed}
        stage = (f"ekfac/{weights}-{samples}-seed{seed}", settings, self.inputs)
        fixed = (self.predict, self.pipeline.schedule, selected, rest, self.data, samples, seed, relative_damping)
        with self.timed("ekfac", self.root.is_finished(*stage)), self.root.stage(*stage) as opened:
            return fit_ekfac(opened.path, *fixed)

    def base_losses(self, config: AttributeConfig) -> np.ndarray:
        """Losses of all pictures under the model's own weights (N, flips), computed or reused."""
        return self._base.losses(config)

    def loss_program(self, config: AttributeConfig) -> LossProgram:
        """The compiled losses for a seed, stride and precision, made once."""
        return self.programs.losses(config)

    def scorer(self) -> Scorer:
        """What scores unlearned queries over the data set."""
        return Scorer(self.programs, self.data, self._base, self.timed)

    def curvature(self, config: AttributeConfig) -> Diagonal | EKFAC | None:
        """F of the Newton step, fitted, reused or from elsewhere; None where the rule has none."""
        if config.update != "newton":
            return None
        if config.curvature == "ekfac":
            return self.ekfac(config.weights, config.fisher_samples, config.loss_seed, config.ekfac_damping)
        if config.fisher is not None:
            return load_fisher(fisher_file(config.fisher), self.programs.selected(config))
        return self.fisher(config.weights, config.fisher_samples, config.loss_seed)

    def unlearned(
        self, path: Path, query: PreparedQuery, config: AttributeConfig, curvature: Diagonal | EKFAC | None = None
    ) -> tuple[Any, tuple[float, ...]]:
        """The selected weights after unlearning the query, and the query's loss before each step, kept in `path`.

        `curvature` is that of `config`, where the caller has it.
        """
        selected, rest = select_weights(self.pipeline.params["unet"], config.weights)
        curvature = curvature or self.curvature(config)
        num_examples = None if curvature is None else config.num_examples or len(self.data)
        with self.timed("unlearn"):
            return unlearn_query(
                path,
                self.gradient_program,
                self.pipeline.schedule,
                selected,
                rest,
                query,
                config,
                curvature,
                num_examples,
                query_mask(query, config),
            )

    def inputs_of(self, config: AttributeConfig) -> dict[str, str]:
        """Fingerprints of all that decides a method's scores, but for its settings and the query."""
        return {**self.inputs, **(picture_inputs(self) if config.method in SIMILARITIES else {})}

    def attribute(
        self, query: Query, config: AttributeConfig = AttributeConfig(), name: str | None = None
    ) -> Attributed:
        """Attributes one query, resuming it or reusing its scores where its folder has them."""
        return self.attribute_many([query], config, [name])[0]

    def attribute_many(
        self,
        queries: Sequence[Query],
        config: AttributeConfig = AttributeConfig(),
        names: Sequence[str | None] | None = None,
    ) -> list[Attributed]:
        """Attributes queries together: each is unlearned, then one pass over the data set scores all of them.

        Every query has a folder of its own, the same as if it were attributed alone, and is resumed or reused there
        whichever others came with it. Exact scores are to the bit those of the query alone; linearised ones of several
        queries are computed in another way than one's and agree with it up to rounding.

        Args:
          queries: at least one.
          config: how to attribute all of them.
          names: of their folders, None for one made from the query and the settings; None for that throughout.

        Raises:
          ValueError: there is no query, or two have one name; whatever is wrong with a query.
        """
        self._check_timesteps(config)
        names = [None] * len(queries) if names is None else list(names)
        if not queries or len(names) != len(queries):
            raise ValueError(f"queries has {len(queries)} and names {len(names)}; expected at least one, and as many")
        for name in names:
            if name is not None:
                check_query_name(name)
        self.timings = {}
        with self.timed("query"):
            prepared = [prepare_query(self.pipeline, self.predict, query) for query in queries]
        # Before anything is stored: a wrong region should leave nothing behind.
        for each in prepared:
            query_mask(each, config)
        shared = config.settings()
        settings = [{"query": query_settings(query), **shared} for query in queries]
        names = [name or query_name(query, own) for name, query, own in zip(names, queries, settings)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            places = [place for place, name in enumerate(names, start=1) if name == twice[0]]
            raise ValueError(
                f"queries number {', '.join(map(str, places))} have one name, {twice[0]!r}; expected a name for each. "
                "Name them, or leave out the repeated ones."
            )
        with contextlib.ExitStack() as stack:
            jobs = []
            for name, own, each in zip(names, settings, prepared):
                remedy = (
                    f"Give another --query_name than {name!r}, or delete {self.root.workdir / 'attribution' / name}."
                )
                stage = stack.enter_context(self.root.stage(f"attribution/{name}", own, self.inputs_of(config), remedy))
                jobs.append(Job(name, own, each, stage))
            results = {}
            for job in jobs:
                if not job.stage.finished:
                    continue
                began, stored = time.monotonic(), read_result(job.folder / "scores.npz")
                if stored is not None:
                    self.timings["scores"] = (round(time.monotonic() - began, 2), True)
                    results[job.name] = self._attributed(job, *stored, len(jobs))
            left = [job for job in jobs if job.name not in results]
            size = queries_in_pass(config, self.programs.selected(config))
            for first in range(0, len(left), size):
                group = left[first : first + size]
                for job, (scores, losses) in zip(group, score(self, group, config)):
                    run_on_host0(functools.partial(write_result, job.folder / "scores.npz", scores, losses))
                    job.stage.finish()
                    results[job.name] = self._attributed(job, scores, losses, len(jobs))
        return [results[job.name] for job in jobs]

    def _attributed(self, job: Job, scores: Scores, losses: tuple[float, ...], together: int) -> Attributed:
        return Attributed(job.name, job.folder, scores, losses, job.prepared, dict(self.timings), together)

    def _check_timesteps(self, config: AttributeConfig) -> None:
        steps = self.pipeline.schedule.num_train_timesteps
        strided_timesteps(config.stride, steps)
        if config.cascade:
            check_range("cascade_stride", config.cascade_stride, 1, steps, integer=True)
        if config.method == "journey-trak":
            check_range("journey_timestep", config.gradients.journey_timestep, 0, steps - 1, integer=True)

    @contextlib.contextmanager
    def timed(self, stage: str, reused: bool = False) -> Iterator[None]:
        """A context that adds its seconds to `timings`; `reused` where it only reads what was stored."""
        began = time.monotonic()
        yield
        before, was_reused = self.timings.get(stage, (0.0, True))
        self.timings[stage] = (round(before + time.monotonic() - began, 2), reused and was_reused)
