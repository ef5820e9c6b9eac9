"""The counterfactual of a fine-tune that a user trained: the adapter again, without the images that a method names.

For every training seed three adapters are trained: on all images, without the K best-scored ones, and without K random
ones; seed, batches and noise are the same but where a removed image came up. The query's loss change dL of the last two
against the first of the same seed says what the removed images had done for the query (METHOD.md section 8), and the
images that the three draw from the query's noise show it.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.convert.adapters.lora import LORA_FILE, read_factors, save_lora
from attrib_jax.convert.adapters.lora_files import denoiser_part
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_range
from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.types import Scores
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.evaluation.counterfactual import training_key
from attrib_jax.evaluation.metrics import Estimate, mean_and_error
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery, Query, decode, generate, text_states
from attrib_jax.models.predictor import predictor
from attrib_jax.training.draws import Training
from attrib_jax.training.lora import LoraConfig, seconds_per_step, train_factors, with_factors

_log = logging.getLogger(__name__)

ALL, TOP, RANDOM = "on all images", "without the top", "without random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """What is removed, how often is trained, and how the query's loss is measured."""

    num_removed: int = setting(10, "Number of images, the best-scored ones, that a training goes without.", low=1)
    num_seeds: int = setting(
        3, "Number of training seeds, from --train_seed on; each trains three adapters.", low=1, high=1000
    )
    measure_stride: int = setting(5, "Distance of the timesteps that the query's loss is averaged over.", low=1)


class Verified(NamedTuple):
    """What the adapters showed; S seeds.

    Attributes:
      seeds: (S,) of training.
      removed: (K,) positions in the data set of the best-scored images, best first.
      losses: variant (`ALL`, `TOP`, `RANDOM`) -> (S,) losses of the query.
      images: variant -> (S, H, W, 3) uint8, drawn from the query's noise.
    """

    seeds: tuple[int, ...]
    removed: np.ndarray
    losses: dict[str, np.ndarray]
    images: dict[str, np.ndarray]

    def change(self, variant: str) -> Estimate:
        """Mean of dL over seeds and its standard error, NaN for a single seed."""
        return mean_and_error(self.losses[variant] - self.losses[ALL])

    def over_random(self) -> Estimate:
        """Mean over seeds of dL without the top, less that without random images, and its standard error."""
        return mean_and_error(self.losses[TOP] - self.losses[RANDOM])


def verify(
    folder: Path,
    run: Run,
    query: Query,
    prepared: PreparedQuery,
    scores: Scores,
    config: VerifyConfig,
    lora: LoraConfig,
) -> Verified:
    """Trains what is missing of the adapters and measures them; says before it starts how long it takes.

    Args:
      folder: keeps every adapter in a folder of its own with its checkpoints; those of other queries and numbers of
        images that lack the same images are used again. A training resumes to the bit. Its contents belong to one base,
        data set and `lora`: the caller opens it as a stage.
      run: the base model, without the adapter, and the images that it was trained on.
      query, prepared: the query, and what its latents are.
      scores: of the run's images, by row id.
      config: see `VerifyConfig`.
      lora: how the adapter was trained; its seed is the first one.

    Raises ValueError where scores are not of this data set, or as many images as there are would be removed.
    """
    data = run.data
    check_range("num_removed", config.num_removed, 1, len(data) - 1, integer=True)
    check_range("measure_stride", config.measure_stride, 1, run.pipeline.schedule.num_train_timesteps, integer=True)
    seeds = tuple(range(lora.seed, lora.seed + config.num_seeds))
    removed = best_positions(scores, data.row_ids, config.num_removed)
    trainings = [
        (variant, Training(gone, seed))
        for seed in seeds
        for variant, gone in (
            (ALL, np.zeros(0, np.int64)),
            (TOP, removed),
            (RANDOM, np.random.default_rng([seed, 1]).permutation(len(data))[: config.num_removed]),
        )
    ]
    announce(folder, run, [training for _, training in trainings], lora)
    losses: dict[str, list[float]] = {ALL: [], TOP: [], RANDOM: []}
    images: dict[str, list[np.ndarray]] = {ALL: [], TOP: [], RANDOM: []}
    for number, (variant, training) in enumerate(trainings, start=1):
        label = f"{variant}, seed {training.seed} ({number} of {len(trainings)})"
        tuned = with_factors(run.pipeline, adapter(folder, run, training, lora, label))
        losses[variant].append(query_loss(tuned, query, prepared, config.measure_stride))
        images[variant].append(
            decode(tuned, generate(tuned, predictor(tuned.unet), [query.prompt], [query.seed], query))[0]
        )
    return Verified(
        seeds,
        removed,
        {variant: np.array(values) for variant, values in losses.items()},
        {variant: np.stack(values) for variant, values in images.items()},
    )


def best_positions(scores: Scores, row_ids: np.ndarray, count: int) -> np.ndarray:
    """(count,) positions in the data set of the best-scored images, best first."""
    position = {int(row): place for place, row in enumerate(row_ids)}
    unknown = [int(row) for row in scores.row_id if int(row) not in position]
    if unknown or len(scores.row_id) < count:
        what = f"row {unknown[0]}, which the data set lacks" if unknown else f"{len(scores.row_id)} rows"
        raise ValueError(f"scores has {what}; expected the scores of this data set, of at least {count} images")
    best = np.argsort(-scores.score, kind="stable")[:count]
    return np.array([position[int(row)] for row in scores.row_id[best]])


def announce(folder: Path, run: Run, trainings: Sequence[Training], lora: LoraConfig) -> None:
    """Prints how many adapters are left to train, and how long that takes by the measured time of a step."""
    missing = {training_key(training) for training in trainings if not _file(folder, training).exists()}
    if not missing:
        print(f"all {len(trainings)} adapters are there")
        return
    seconds = seconds_per_step(run, lora)
    minutes = len(missing) * lora.steps * seconds / 60
    print(
        f"{len(missing)} of {len(trainings)} adapters to train, {lora.steps} steps each at {seconds:.3g} s: about "
        f"{minutes:.3g} minutes",
        flush=True,
    )


def adapter(folder: Path, run: Run, training: Training, lora: LoraConfig, description: str) -> dict[str, Any]:
    """The factors of one training, trained where they are not stored."""
    file = _file(folder, training)
    if not file.exists():
        factors = train_factors(file.parent, run, lora, training, description)
        save_lora(factors, file.parent, denoiser_part(run.pipeline))
    return read_factors(str(file), run.pipeline)


def _file(folder: Path, training: Training) -> Path:
    return folder / training_key(training) / LORA_FILE


def query_loss(pipeline: Pipeline, query: Query, prepared: PreparedQuery, stride: int) -> float:
    """The strided loss of the query's latents under its prompt; the noise is one draw for each timestep."""
    text = jax.tree.map(lambda leaf: leaf[0], text_states(pipeline, [query.prompt]))
    timesteps = strided_timesteps(stride, pipeline.schedule.num_train_timesteps)
    return float(_loss(pipeline.unet, pipeline.params["unet"], pipeline.schedule, prepared.latents, text, timesteps))


@functools.partial(jax.jit, static_argnums=0)
def _loss(
    unet: Any, params: Any, schedule: Any, latents: jax.Array, text: jax.Array, timesteps: jax.Array
) -> jax.Array:
    noise = example_noise(loss_key(0), 0, 0, 0, timesteps, latents.shape)
    return denoising_loss(predictor(unet), params, schedule, latents, text, noise, timesteps)
