"""The main job: run the stages that are missing, unlearn the query, score every training picture."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribution.regions import region_mask
from attrib_jax.attribution.scores import EXAMPLES_PER_TILE, combine_scores
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_finite
from attrib_jax.core.fingerprint import params_fingerprint
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import merge_weights, select_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.models.unet import predictor
from attrib_jax.runtime.files import write_npz
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.encode import EncodeConfig, encode, stage_names
from attrib_jax.stages.encoded import EncodedDataset
from attrib_jax.stages.fisher import fisher_file, fit_fisher, load_fisher
from attrib_jax.stages.gradient import GradientProgram
from attrib_jax.stages.losses import LossProgram, dataset_values
from attrib_jax.stages.query import PreparedQuery, Query, prepare_query
from attrib_jax.stages.root import StageRoot
from attrib_jax.stages.unlearn import unlearn_query

_log = logging.getLogger(__name__)

# Relative difference of base losses between devices that are taken to be of one kind.
_LOSS_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Attributed:
    """One finished attribution.

    Attributes:
      name: of the query's folder.
      folder: where its files are.
      scores: of every training picture.
      query_loss: the query's loss before each unlearning step; empty for methods without one.
      query: picture and UNet inputs.
      timings: stage -> (seconds, whether it was reused).
    """

    name: str
    folder: Path
    scores: Scores
    query_loss: tuple[float, ...]
    query: PreparedQuery
    timings: dict[str, tuple[float, bool]]


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
      workdir: keeps the stages for further queries; a temporary folder if None.
      shipped: folder of finished stages that came with the model, such as `models/openmoji/stages`.
      encode_config: how pictures and captions are encoded.

    Raises:
      ValueError: an argument is out of range.
      StorageError: the workdir holds stages of another model or data set, is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if workdir is None:
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
        self._programs: dict[tuple, LossProgram] = {}
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
        with self._timed("encode", reused):
            self._data = encode(self.root, self.pipeline, self.inputs, self.dataset, config)

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
        stage = self._loss_stage(config)
        if config.flips == "none":
            both = self._loss_stage(dataclasses.replace(config, flips="max"))
            if self.root.is_finished(*both):
                # The losses of the pictures as they are, to the bit.
                return self.base_losses(dataclasses.replace(config, flips="max"))[:, :1]
        params = self.pipeline.params["unet"]
        reused = self.root.is_finished(*stage)
        with self._timed("base losses", reused):
            with self.root.stage(*stage) as opened:
                losses = self.losses(opened.path, params, config, "losses before")
            if reused and not self._reproduces(losses, params, config):
                _log.warning("the stored base losses are of another kind of device: computing them anew")
                self.root.discard(stage[0])
                with self.root.stage(*stage) as opened:
                    losses = self.losses(opened.path, params, config, "losses before")
        return losses

    def _loss_stage(self, config: AttributeConfig) -> tuple[str, dict[str, Any], dict[str, str]]:
        settings = {name: getattr(config, name) for name in ("loss_seed", "stride", "captions", "num_flips")}
        name = f"losses/stride{config.stride}-{config.captions}-flips{config.num_flips}-seed{config.loss_seed}"
        return name, settings, self.inputs

    def _reproduces(self, losses: np.ndarray, params: Any, config: AttributeConfig) -> bool:
        """Whether this machine gives the stored losses of the first rows.

        Kinds of devices differ in rounding. A score is the difference of two losses, so losses before and after have
        to come from devices that agree far better than the scores are small.
        """
        program = self.loss_program(config)
        rows = np.arange(min(EXAMPLES_PER_TILE, len(losses)))
        again = program(program.place(params), self.data, rows, config.num_flips, config.captions, lambda count: None)
        return bool(np.allclose(again, losses[rows], rtol=_LOSS_TOLERANCE, atol=0))

    def unlearned(self, path: Path, query: PreparedQuery, config: AttributeConfig) -> tuple[Any, tuple[float, ...]]:
        """The selected weights after unlearning the query, and the query's loss before each step, kept in `path`."""
        selected, rest = select_weights(self.pipeline.params["unet"], config.weights)
        newton = config.update == "newton"
        curvature = None
        if newton and config.fisher is not None:
            curvature = load_fisher(fisher_file(config.fisher), selected)
        elif newton:
            curvature = self.fisher(config.weights, config.fisher_samples, config.loss_seed)
        num_examples = (config.num_examples or len(self.data)) if newton else None
        with self._timed("unlearn"):
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
                _mask(query, config),
            )

    def attribute(self, query: Query, config: AttributeConfig, name: str | None = None) -> Attributed:
        """Attributes one query, resuming it or reusing its scores where its folder has them."""
        strided_timesteps(config.stride, self.pipeline.schedule.num_train_timesteps)
        if name is not None and not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise ValueError(f"query_name is {name!r}; expected letters, digits, '.', '_' and '-', as in a file name")
        self.timings = {}
        with self._timed("query"):
            prepared = prepare_query(self.pipeline, self.predict, query)
        # Before anything is stored: a wrong region should leave nothing behind.
        _mask(prepared, config)
        settings = {"query": _query_settings(query), **config.settings()}
        name = name or query_name(query, settings)
        with self.root.stage(f"attribution/{name}", settings, self.inputs) as stage:
            stored = _stored_scores(stage.path) if stage.finished else None
            if stored is not None:
                return Attributed(name, stage.path, *stored, prepared, dict(self.timings))
            if config.method == "random":
                scores, losses = Scores(self.dataset.row_ids, _random_scores(self.dataset.row_ids, settings)), ()
            else:
                scores, losses = self._score_by_unlearning(stage.path, prepared, config)
            arrays = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
            arrays["query_loss"] = np.array(losses)
            write_npz(stage.path / "scores.npz", {key: value for key, value in arrays.items() if value is not None})
        return Attributed(name, stage.path, scores, losses, prepared, dict(self.timings))

    def _score_by_unlearning(self, folder: Path, query: PreparedQuery, config: AttributeConfig):
        if self._data is None:
            self.prepare()
        selected, losses = self.unlearned(folder, query, config)
        before = self.base_losses(config)
        _, rest = select_weights(self.pipeline.params["unet"], config.weights)
        with self._timed("losses after"):
            after = self.losses(folder, merge_weights(selected, rest), config, "losses after")
        score, flip = combine_scores(before, after, config.flips)
        scores = Scores(self.data.row_ids, score, before, after, None if config.flips == "mean" else flip)
        return scores, tuple(losses)

    def losses(self, path: Path, params: Any, config: AttributeConfig, description: str) -> np.ndarray:
        """Losses of all pictures under any UNet parameters (N, flips), kept in chunks in `path` and resumed there."""
        program = self.loss_program(config)
        return dataset_values(path, program, params, self.data, config.num_flips, config.captions, description)

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


def _stored_scores(folder: Path) -> tuple[Scores, tuple[float, ...]] | None:
    """Scores and query losses of a finished attribution; None where they are absent or damaged."""
    try:
        with np.load(folder / "scores.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
        query_loss = tuple(arrays.pop("query_loss").tolist())
        return Scores(**arrays), query_loss
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        _log.warning("%s cannot be read (%s): it will be computed again", folder / "scores.npz", error)
        return None


def _mask(query: PreparedQuery, config: AttributeConfig) -> np.ndarray | None:
    if config.region is None:
        return None
    return region_mask(config.region, query.image.shape[:2], query.latents.shape[:2])


def model_fingerprint(pipeline: Pipeline) -> str:
    """sha256 of all that decides what a model computes: weights, configs, schedule and tokenizer."""
    backend = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())
    configs = {
        "unet": pipeline.unet.config.to_dict(),
        "vae": pipeline.vae.config.to_dict(),
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "schedule": pipeline.schedule.to_config(),
        "tokenizer": {part: backend[part] for part in ("model", "normalizer", "pre_tokenizer", "post_processor")},
        "max_tokens": pipeline.tokenizer.model_max_length,
    }
    # Added tokens have no place in the vocabulary; a model without them keeps the fingerprint that it had.
    added = {token["content"]: token["id"] for token in backend["added_tokens"] if not token["special"]}
    if added:
        configs["added_tokens"] = added
    text = params_fingerprint(pipeline.params) + json.dumps(configs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def query_name(query: Query, settings: dict[str, Any]) -> str:
    """Folder name of a query: its prompt, its seed if generated, and a digest of every setting."""
    slug = re.sub(r"[^a-z0-9]+", "-", query.prompt.lower()).strip("-")[:40] or "empty-prompt"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    origin = "latents" if query.latents is not None else f"seed{query.seed}" if query.image is None else "picture"
    return f"{slug}-{origin}-{digest}"


def _random_scores(row_ids: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Uniform scores, a function of the query's settings and the row id alone."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    return generator.random(int(row_ids.max()) + 1)[row_ids]


def _query_settings(query: Query) -> dict[str, Any]:
    settings = {field.name: getattr(query, field.name) for field in dataclasses.fields(query)}
    given = {name: value for name in ("image", "latents", "text") if (value := settings.pop(name)) is not None}
    if not {"image", "latents"} & given.keys():
        return settings
    content = {
        name: np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else Path(value).read_bytes()
        for name, value in given.items()
    }
    return {"prompt": query.prompt} | {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
