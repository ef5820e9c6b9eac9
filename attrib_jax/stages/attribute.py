"""The main job: run the stages that are missing, unlearn the query, score every training picture."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribution.regions import region_mask
from attrib_jax.attribution.scores import FLIP_RULES, combine_scores
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.attribution.unlearn import unlearn
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_choice, check_finite, check_positive, check_range
from attrib_jax.core.fingerprint import params_fingerprint
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import WEIGHT_SUBSETS, flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.models.unet import predictor
from attrib_jax.runtime.files import read_arrays, write_arrays, write_npz
from attrib_jax.runtime.progress import progress
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.encode import EncodedDataset, encode
from attrib_jax.stages.fisher import fit_fisher
from attrib_jax.stages.gradient import GradientProgram
from attrib_jax.stages.losses import LossProgram, dataset_losses
from attrib_jax.stages.query import PreparedQuery, Query, prepare_query
from attrib_jax.stages.root import StageRoot

METHODS = ("unlearn", "random")
CAPTIONS = ("first", "all")


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
    """How to attribute; METHOD.md sections 3 to 6.

    Attributes:
      method: `unlearn`, or `random` (uniform scores, the floor that a method has to beat).
      weights: the subset that moves, see `WEIGHT_SUBSETS`.
      update: `newton` (eq. 5) or `sgd` (plain ascent without F).
      step_size: alpha of a step.
      steps: unlearning steps.
      query_draws: (t, noise) draws averaged into the gradient of each step.
      damping: added to F.
      keep_ewc_gradient: keep the pull towards the first weights (appendix A.2).
      num_examples: N of the Newton step; None for the size of the data set.
      fisher_samples: (picture, flip, caption, t, noise) samples that F is fitted on.
      stride: of the strided loss sum over timesteps.
      captions: `first` or `all` captions of a picture, their losses averaged.
      flips: `max` or `mean` of the two mirror images' scores, or `none` for the picture as is.
      loss_seed: of the noise of the scores, of F and of the query's draws: another query reuses the base losses.
      region: (x0, y0, x1, y1) in query pixels; only these count in the query's loss. None for all.
      batch_size: examples in flight; changes speed and memory only. 0 is automatic.
    """

    method: str = "unlearn"
    weights: str = "cross-attn-kv"
    update: str = "newton"
    step_size: float = 0.01
    steps: int = 1
    query_draws: int = 2048
    damping: float = 0.0
    keep_ewc_gradient: bool = False
    num_examples: int | None = None
    fisher_samples: int = 16384
    stride: int = 100
    captions: str = "first"
    flips: str = "max"
    loss_seed: int = 0
    region: tuple[int, int, int, int] | None = None
    batch_size: int = 0

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_choice("weights", self.weights, WEIGHT_SUBSETS)
        check_choice("update", self.update, UPDATES)
        check_choice("captions", self.captions, CAPTIONS)
        check_choice("flips", self.flips, FLIP_RULES)
        for name in ("steps", "query_draws", "fisher_samples", "stride"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("step_size", self.step_size)
        check_range("damping", self.damping, 0.0)
        check_range("batch_size", self.batch_size, 0, integer=True)
        check_range("loss_seed", self.loss_seed, 0, 2**32 - 1, integer=True)
        if self.num_examples is not None:
            check_positive("num_examples", self.num_examples, integer=True)
        if self.update == "sgd" and (self.damping or self.keep_ewc_gradient):
            raise ValueError("damping and keep_ewc_gradient belong to update='newton'; 'sgd' has no F")

    @property
    def num_flips(self) -> int:
        return 1 if self.flips == "none" else 2

    def settings(self) -> dict[str, Any]:
        """What decides the scores: everything but the batch size."""
        settings = dataclasses.asdict(self)
        del settings["batch_size"]
        return settings


@dataclasses.dataclass(frozen=True)
class Attributed:
    """One finished attribution.

    Attributes:
      name: of the query's folder.
      folder: where its files are.
      scores: of every training picture.
      query: picture and UNet inputs.
      query_loss: the query's loss before each unlearning step; empty for methods without one.
      timings: stage -> (seconds, whether it was reused).
    """

    name: str
    folder: Path
    scores: Scores
    query: PreparedQuery
    query_loss: tuple[float, ...]
    timings: dict[str, tuple[float, bool]]


def attribute(
    pipeline: Pipeline,
    dataset: Dataset,
    query: Query,
    config: AttributeConfig = AttributeConfig(),
    workdir: str | os.PathLike | None = None,
) -> Scores:
    """Scores every picture of `dataset` by its influence on `query`.

    Args:
      pipeline: see `load_pipeline`.
      dataset: its training pictures, see `open_dataset`.
      query: a prompt to generate from, or a picture with its prompt.
      config: see `AttributeConfig`.
      workdir: keeps the stages for further queries; a temporary folder if None.

    Raises:
      ValueError: an argument is out of range.
      StorageError: the workdir holds stages of another model or data set, is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if workdir is None:
            workdir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(lock(workdir))
        return Attributor(pipeline, dataset, StageRoot(workdir)).attribute(query, config).scores


class Attributor:
    """A model, its training set and a workdir, ready for queries; hold the lock of the workdir while using it.

    Everything that does not depend on the query is loaded or computed once.
    """

    def __init__(self, pipeline: Pipeline, dataset: Dataset, root: StageRoot):
        check_finite("model", pipeline.params)
        self.pipeline, self.dataset, self.root = pipeline, dataset, root
        self.predict = predictor(pipeline.unet)
        self.timings: dict[str, tuple[float, bool]] = {}
        self.inputs = {"model": model_fingerprint(pipeline), "dataset": dataset.fingerprint()}
        self._data: EncodedDataset | None = None
        self._programs: dict[tuple, LossProgram] = {}
        self._gradient_program = GradientProgram(self.predict, pipeline.schedule)

    @property
    def data(self) -> EncodedDataset:
        """The encoded data set."""
        if self._data is None:
            reused = self.root.is_finished("latents", {"dataset": self.dataset.name}, self.inputs)
            with self._timed("encode", reused):
                self._data = encode(
                    self.root, self.pipeline, self.inputs["model"], self.dataset, self.inputs["dataset"]
                )
        return self._data

    def fisher(self, weights: str, samples: int, seed: int) -> Diagonal:
        """The diagonal Fisher information of a weight subset, fitted or reused."""
        selected, rest = select_weights(self.pipeline.params["unet"], weights)
        settings = {"weights": weights, "samples": samples, "seed": seed}
        stage = (f"fisher/{weights}-{samples}-seed{seed}", settings, self.inputs)
        data = self.data
        with self._timed("fisher", self.root.is_finished(*stage)), self.root.stage(*stage) as opened:
            return fit_fisher(opened.path, self.predict, self.pipeline.schedule, selected, rest, data, samples, seed)

    def base_losses(self, config: AttributeConfig) -> np.ndarray:
        """Losses of all pictures under the model's own weights (N, flips), computed or reused."""
        settings = {name: getattr(config, name) for name in ("loss_seed", "stride", "captions", "num_flips")}
        name = f"losses/stride{config.stride}-{config.captions}-flips{config.num_flips}-seed{config.loss_seed}"
        stage = (name, settings, self.inputs)
        data = self.data
        with self._timed("base losses", self.root.is_finished(*stage)), self.root.stage(*stage) as opened:
            return self._losses(opened.path, self.pipeline.params["unet"], config, data, "losses before")

    def unlearned(self, query: PreparedQuery, config: AttributeConfig) -> tuple[Any, tuple[float, ...]]:
        """The selected weights after unlearning the query, and the query's loss before each step."""
        selected, rest = select_weights(self.pipeline.params["unet"], config.weights)
        newton = config.update == "newton"
        curvature = self.fisher(config.weights, config.fisher_samples, config.loss_seed) if newton else None
        mask = _mask(query, config)
        with self._timed("unlearn"), progress(config.steps * config.query_draws, "unlearn the query", "draw") as bar:
            result = unlearn(
                self.predict,
                self.pipeline.schedule,
                selected,
                rest,
                query.latents,
                query.text,
                purpose_key(config.loss_seed, "query"),
                draws=config.query_draws,
                step_size=config.step_size,
                method=config.update,
                curvature=curvature,
                num_examples=(config.num_examples or len(self.dataset)) if newton else None,
                steps=config.steps,
                damping=config.damping,
                keep_ewc_gradient=config.keep_ewc_gradient,
                mask=mask,
                progress=lambda done: bar.update(done - bar.n),
                sum_draws=self._gradient_program.bind(rest, query.latents, query.text, config.query_draws, mask),
            )
        return result.selected, tuple(float(loss) for loss in result.query_loss)

    def attribute(self, query: Query, config: AttributeConfig, name: str | None = None) -> Attributed:
        """Attributes one query, resuming it or reusing its scores where its folder has them."""
        strided_timesteps(config.stride, self.pipeline.schedule.num_train_timesteps)
        self.timings = {}
        with self._timed("query"):
            prepared = prepare_query(self.pipeline, self.predict, query)
        # Before anything is stored: a wrong region should leave nothing behind.
        _mask(prepared, config)
        settings = {"query": _query_settings(query), **config.settings()}
        name = name or query_name(query, settings)
        with self.root.stage(f"attribution/{name}", settings, self.inputs) as stage:
            if config.method == "random":
                generator = np.random.default_rng([config.loss_seed, query.seed])
                scores, losses = Scores(self.dataset.row_ids, generator.random(len(self.dataset))), ()
            else:
                scores, losses = self._score_by_unlearning(stage.path, prepared, config)
            arrays = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
            write_npz(stage.path / "scores.npz", {key: value for key, value in arrays.items() if value is not None})
        return Attributed(name, stage.path, scores, prepared, losses, dict(self.timings))

    def _score_by_unlearning(self, folder: Path, query: PreparedQuery, config: AttributeConfig):
        before = self.base_losses(config)
        file = folder / "unlearned.safetensors"
        if file.exists():
            arrays, losses = read_arrays(file)
            selected = unflatten_names(arrays)
        else:
            selected, losses = self.unlearned(query, config)
            write_arrays(file, {key: np.asarray(value) for key, value in flatten_names(selected).items()}, list(losses))
        _, rest = select_weights(self.pipeline.params["unet"], config.weights)
        data = self.data
        with self._timed("losses after"):
            after = self._losses(folder, merge_weights(selected, rest), config, data, "losses after")
        score, flip = combine_scores(before, after, config.flips)
        return Scores(self.dataset.row_ids, score, before, after, None if config.flips == "mean" else flip), tuple(
            losses
        )

    def _losses(self, path, params, config: AttributeConfig, data: EncodedDataset, description: str) -> np.ndarray:
        program = self.loss_program(config)
        return dataset_losses(path, program, params, data, config.num_flips, config.captions, description)

    def loss_program(self, config: AttributeConfig) -> LossProgram:
        """The compiled losses for a seed and stride, made once."""
        key = (config.loss_seed, config.stride, config.batch_size)
        if key not in self._programs:
            self._programs[key] = LossProgram(self.predict, self.pipeline.schedule, *key)
        return self._programs[key]

    @contextlib.contextmanager
    def _timed(self, stage: str, reused: bool = False):
        began = time.monotonic()
        yield
        self.timings[stage] = (round(time.monotonic() - began, 2), reused)


def _mask(query: PreparedQuery, config: AttributeConfig) -> np.ndarray | None:
    if config.region is None:
        return None
    return region_mask(config.region, query.image.shape[:2], query.latents.shape[:2])


def model_fingerprint(pipeline: Pipeline) -> str:
    """sha256 of all that decides what a model computes: weights, configs, schedule and vocabulary."""
    configs = {
        "unet": pipeline.unet.config.to_dict(),
        "vae": pipeline.vae.config.to_dict(),
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "schedule": pipeline.schedule.to_config(),
        "vocabulary": sorted(pipeline.tokenizer.get_vocab().items()),
        "max_tokens": pipeline.tokenizer.model_max_length,
    }
    text = params_fingerprint(pipeline.params) + json.dumps(configs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def query_name(query: Query, settings: dict[str, Any]) -> str:
    """Folder name of a query: its prompt, its seed if generated, and a digest of every setting."""
    slug = re.sub(r"[^a-z0-9]+", "-", query.prompt.lower()).strip("-")[:40] or "empty-prompt"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    origin = f"seed{query.seed}" if query.image is None else "picture"
    return f"{slug}-{origin}-{digest}"


def _query_settings(query: Query) -> dict[str, Any]:
    if query.image is None:
        return dataclasses.asdict(query)
    content = query.image.tobytes() if isinstance(query.image, np.ndarray) else Path(query.image).read_bytes()
    return {"prompt": query.prompt, "image": hashlib.sha256(content).hexdigest()}
