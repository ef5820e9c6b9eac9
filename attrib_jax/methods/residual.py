"""Method `residual`: products of residuals and of captions, the tangent kernel seen from the model's output.

docs/METHOD.md, "The residual product". One forward pass a training image and timestep, in a stage that all queries
share, serves all queries; a query costs its own forward passes and one inner product with every stored residual.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.attribution.projection import check_projection, project
from attrib_jax.attribution.residual import mean_over_captions, residual_products, residuals
from attrib_jax.attribution.scores import make_scores
from attrib_jax.attribution.similarity import (
    TEXT_KERNELS,
    TextStatistics,
    gaussian_kernel,
    same_caption,
    text_statistics,
    token_kernels,
)
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs.context import Run, check_images
from attrib_jax.jobs.encoded_dataset import CaptionRows, caption_rows, caption_texts, encoded_queries
from attrib_jax.jobs.losses import ExampleProgram
from attrib_jax.jobs.settings import SHARED_NOISE_HELP, LossSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.models.predictor import cast_params, predictor
from attrib_jax.models.projected_text import text_rows
from attrib_jax.parallel.hosts import host0_first, run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import stored_arrays, write_arrays

_log = logging.getLogger(__name__)

_PROJECTION = "rademacher"
_TEXT_FILE = "text.safetensors"
# Row id of the queries' noise where it is not shared: no training image has it.
_LAST_ROW_ID = 2**31 - 1
_MAX_ROWS_PER_CHUNK = 256
_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig(MethodConfig, LossSettings):
    """Settings of the residual product."""

    method: str = setting("residual", "Attribution method.", choices=("residual",))
    residual_start: int = setting(
        550, "First timestep of the residuals: of the timesteps 0, stride, 2 stride, ... those from it on count.", low=0
    )
    shared_noise: bool = setting(True, SHARED_NOISE_HELP)
    residual_dim: int = setting(
        0, "Dimension of a random projection of the stored residuals, which keeps inner products; 0 stores them whole.",
        low=0, symbol="k",
    )  # fmt: skip
    residual_seed: int = setting(
        0, "Seed of the residuals' random projection.", low=0, high=2**32 - 1, only_if="residual_dim"
    )
    text_kernel: tuple[str, ...] = setting(
        ("gaussian",),
        "Kernel of captions, or several whose product counts: of pooled text states (gaussian), equal captions (same), "
        "the text states token by token in the metric of their second moment (tokens), or none.",
        choices=TEXT_KERNELS,
    )
    text_width: float = setting(
        0.1,
        "Width of the Gaussian kernel of captions, as a share of the median distance of different captions.",
        above=0,
        only_if=("text_kernel", "gaussian"),
    )
    text_damping: float = setting(
        0.1,
        "Share of the mean eigenvalue of the text states' second moment that is added to its eigenvalues.",
        above=0,
        symbol="lambda",
        only_if=("text_kernel", "tokens"),
    )

    def __post_init__(self):
        super().__post_init__()
        names = self.text_kernel
        if not names or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
            raise ValueError(
                f"text_kernel is {names}: expected one or more of {', '.join(TEXT_KERNELS)}, each once, and none by "
                "itself. Change text_kernel."
            )
        if self.residual_dim:
            check_projection(_PROJECTION, self.residual_dim)


def check(run: Run, config: ResidualConfig) -> None:
    """Raises ValueError where no timestep is left, or captions are to be compared that the data set does not hold."""
    if not len(_timesteps(run, config)):
        last = strided_timesteps(config.stride, run.pipeline.schedule.num_train_timesteps)[-1]
        raise ValueError(
            f"residual_start is {config.residual_start}: expected at most {last}, the last timestep of stride "
            f"{config.stride}. Change residual_start or stride."
        )
    if "same" in config.text_kernel:
        check_images(run.dataset, config.method)


class Prepared(NamedTuple):
    """What all queries share.

    Attributes:
      captions: the M captions that count.
      residuals: (M, flips, k) float16, on disk.
      statistics: of the captions' text states; None where no kernel reads them.
      texts: the captions; None where no kernel reads them.
    """

    captions: CaptionRows
    residuals: Any
    statistics: TextStatistics | None
    texts: list[str] | None


def prepare(run: Run, config: ResidualConfig) -> Prepared:
    """Residuals of every training image and caption, and statistics of the captions: computed, resumed or reused."""
    captions = caption_rows(run.data, config.captions)
    stage = _stage(run, config)
    with run.timed("residuals", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        stored = _dataset_residuals(run, opened.path, config, captions)
    statistics = None
    if {"gaussian", "tokens"} & set(config.text_kernel):
        stage = f"text_statistics/{config.captions}", {"captions": config.captions}, run.inputs
        with run.timed("text statistics", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
            statistics = _text_statistics(run, opened.path / _TEXT_FILE, captions)
    texts = caption_texts(run.dataset, run.data, captions) if "same" in config.text_kernel else None
    return Prepared(captions, stored, statistics, texts)


def score(run: Run, queries: Sequence[QueryJob], config: ResidualConfig) -> list[Scored]:
    """k_text(c_hat, c) times the mean over timesteps and latents of r_hat r, the mean over an image's captions.

    A query's residual is that of the given image under the given prompt, whatever guidance it was drawn with. Several
    queries are one matrix product, whose last digits depend on how many there are.
    """
    return score_prepared(run, queries, config, prepare(run, config), run.data.row_ids)


def score_prepared(
    run: Run, queries: Sequence[QueryJob], config: ResidualConfig, shared: Prepared, row_ids: np.ndarray
) -> list[Scored]:
    """As `score`, of the images `row_ids` (N,) whose residuals and captions are `shared`."""
    with run.timed("residuals of the queries"):
        own = _query_residuals(run, queries, config)
    with run.timed("scores"):
        values = residual_products(shared.residuals, own) / (len(_timesteps(run, config)) * math.prod(_shape(run)))
        values *= _text_kernel(run, queries, config, shared)[:, :, None]
        values = mean_over_captions(values, shared.captions.image)
    return [Scored(make_scores(row_ids, each, None, config.flips)) for each in values]


def _timesteps(run: Run, config: ResidualConfig) -> np.ndarray:
    timesteps = strided_timesteps(config.stride, run.pipeline.schedule.num_train_timesteps)
    return timesteps[timesteps >= config.residual_start]


def _shape(run: Run) -> tuple[int, ...]:
    return run.data.latent_shape


def _program(run: Run, config: ResidualConfig) -> ExampleProgram:
    """The compiled residuals; its weights are `(parameters, projection key)`."""
    timesteps = _timesteps(run, config)
    predict = predictor(run.pipeline.unet, config.precision)
    width = config.residual_dim or len(timesteps) * math.prod(_shape(run))
    return ExampleProgram(
        _residuals,
        run.pipeline.schedule,
        config,
        result_shape=(width,),
        timesteps=timesteps,
        static=(predict, config.shared_noise, config.residual_dim),
        shared_noise=config.shared_noise,
    )


def _residuals(predict, common: bool, dim: int, shared, batch: Batch) -> jax.Array:
    schedule, key, timesteps, (params, projection_key) = shared
    found = residuals(predict, schedule, params, key, batch, timesteps, shared=common)
    return project({"residual": found}, projection_key, _PROJECTION, dim) if dim else found


def _place(run: Run, program: ExampleProgram, config: ResidualConfig) -> Any:
    params = cast_params(run.pipeline.params["unet"], config.precision)
    return program.place((params, purpose_key(config.residual_seed, "residual projection")))


def _dataset_residuals(run: Run, path: Path, config: ResidualConfig, captions: CaptionRows) -> Any:
    """Residuals of every caption's image and mirror image -> (M, flips, k) float16, kept in chunks and resumed.

    Raises ValueError where one does not fit float16.
    """
    program, flips, count = _program(run, config), config.num_flips, len(captions.image)
    (width,) = program.result_shape
    row_bytes = 2 * flips * width
    rows_per_chunk = max(1, min(_MAX_ROWS_PER_CHUNK, _CHUNK_BYTES // row_bytes))
    fields = {"residual": ((flips, width), np.float16)}
    store = host0_first(lambda: ChunkStore(path, fields, count, rows_per_chunk, name="residuals"))
    missing = store.pending_chunks()
    weights = _place(run, program, config) if missing else None
    each = flips * program.num_timesteps
    left = sum(store.rows(index).stop - store.rows(index).start for index in missing)
    with progress(count * each, "residuals", "forward", initial=(count - left) * each) as bar:
        for index in missing:
            rows = np.arange(count)[store.rows(index)]
            examples, flip = np.repeat(rows, flips), np.tile(np.arange(flips), len(rows))
            values = program.examples(
                weights, run.data, captions.image[examples], flip, captions.caption[examples], bar.update
            )
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(broken):
                row_id = int(run.data.row_ids[captions.image[examples[broken[0]]]])
                raise ValueError(
                    f"the residual of row {row_id} is NaN or too large for float16: look for a damaged model, or keep "
                    "precision='float32'"
                )
            values = values.reshape(len(rows), flips, width)
            run_on_host0(functools.partial(store.write, index, {"residual": values}))
    return store.array("residual")


def _query_residuals(run: Run, queries: Sequence[QueryJob], config: ResidualConfig) -> np.ndarray:
    """(Q, k) float64, of each query's image as it is under its own prompt."""
    program = _program(run, config)
    weights, found = _place(run, program, config), np.empty((len(queries), *program.result_shape))
    lengths = [len(text_rows(query.prepared.text)) for query in queries]
    for length in sorted(set(lengths)):
        members = np.flatnonzero(np.equal(lengths, length)).tolist()
        stacked = [(queries[place].prepared.latents, queries[place].prepared.text) for place in members]
        latents, conditioning = jax.tree.map(lambda *leaves: np.stack(leaves), *stacked)
        row_ids = np.full(len(members), _LAST_ROW_ID, np.int32)
        data = encoded_queries(row_ids, latents, conditioning, "the queries")
        rows, zeros = np.arange(len(members)), np.zeros(len(members), np.int64)
        found[members] = program.examples(weights, data, rows, zeros, zeros)
    return found


def _text_kernel(run: Run, queries: Sequence[QueryJob], config: ResidualConfig, shared: Prepared) -> np.ndarray:
    """(Q, M) float64, the product of the kernels."""
    kernel = np.ones((len(queries), len(shared.captions.image)))
    if "same" in config.text_kernel:
        for query, row in zip(queries, kernel):
            row *= same_caption(query.prepared.prompt, shared.texts)
            if not row.any():
                _log.warning(
                    "%s: no training image has its caption, so every score is 0; take another text_kernel", query.name
                )
    if "gaussian" in config.text_kernel:
        for query, row in zip(queries, kernel):
            row *= gaussian_kernel(text_rows(query.prepared.text), shared.statistics, config.text_width)
    if "tokens" in config.text_kernel:
        states, rows = [text_rows(query.prepared.text) for query in queries], shared.captions.text
        kernel *= token_kernels(states, run.data.text, rows, shared.statistics, config.text_damping)
    return kernel


def _text_statistics(run: Run, file: Path, captions: CaptionRows) -> TextStatistics:
    stored = run_on_host0(lambda: stored_arrays(file))
    if stored is None:
        computed = run_on_host0(lambda: text_statistics(run.data.text, captions.text)._asdict())
        run_on_host0(lambda: write_arrays(file, computed, {}))
        stored = computed
    return TextStatistics(**stored)


def _stage(run: Run, config: ResidualConfig) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """Name, settings and inputs of the training images' residuals."""
    names = ("loss_seed", "stride", "residual_start", "shared_noise", "captions", "num_flips")
    settings = {name: getattr(config, name) for name in names}
    name = (
        f"residuals/stride{config.stride}-from{config.residual_start}-{config.captions}-flips{config.num_flips}"
        f"-seed{config.loss_seed}"
    )
    if not config.shared_noise:
        name += "-own-noise"
    if config.residual_dim:
        name += f"-dim{config.residual_dim}-{config.residual_seed}"
        settings |= {"residual_dim": config.residual_dim, "residual_seed": config.residual_seed}
    if config.precision != "float32":
        name, settings = f"{name}-{config.precision}", {**settings, "precision": config.precision}
    return name, settings, run.inputs
