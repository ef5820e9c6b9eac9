"""The counterfactual of a model that a user trained: trained again, without the images that a method names.

For every training seed three models are trained: on all images, without the K best-scored ones, and without K random
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

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_range
from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.types import Scores
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.evaluation.counterfactual import training_key
from attrib_jax.evaluation.metrics import Estimate, mean_and_error
from attrib_jax.evaluation.trainers import Trainer
from attrib_jax.jobs.query import PreparedQuery, Query, decode, generate, text_states
from attrib_jax.models.predictor import predictor
from attrib_jax.training.draws import Training

_log = logging.getLogger(__name__)

ALL, TOP, RANDOM = "on all images", "without the top", "without random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """What is removed, how often is trained, and how the query's loss is measured."""

    num_removed: int = setting(10, "Number of images, the best-scored ones, that a training goes without.", low=1)
    num_seeds: int = setting(
        3, "Number of training seeds, from --train_seed on; each trains three models.", low=1, high=1000
    )
    measure_stride: int = setting(5, "Distance of the timesteps that the query's loss is averaged over.", low=1)


class Verified(NamedTuple):
    """What the models showed; S seeds.

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
    trainer: Trainer,
    query: Query,
    prepared: PreparedQuery,
    scores: Scores,
    config: VerifyConfig,
) -> Verified:
    """Trains what is missing of the models and measures them; says before it starts how long it takes.

    Args:
      folder: keeps every model in a folder of its own with its checkpoints; those of other queries and numbers of
        images that lack the same images are used again. A training resumes to the bit. Its contents belong to one
        trainer, but for its seed: the caller opens it as a stage.
      trainer: trains models without some of the images, from its first seed on.
      query, prepared: the query, and what its latents are.
      scores: of the trainer's images, by row id.
      config: see `VerifyConfig`.

    Raises ValueError where scores are not of these images, or as many images as there are would be removed.
    """
    rows = trainer.row_ids
    check_range("num_removed", config.num_removed, 1, len(rows) - 1, integer=True)
    timesteps = trainer.pipeline.schedule.num_train_timesteps
    check_range("measure_stride", config.measure_stride, 1, timesteps, integer=True)
    seeds = tuple(range(trainer.seed, trainer.seed + config.num_seeds))
    removed = best_positions(scores, rows, config.num_removed)
    trainings = [
        (variant, Training(gone, seed))
        for seed in seeds
        for variant, gone in (
            (ALL, np.zeros(0, np.int64)),
            (TOP, removed),
            (RANDOM, np.random.default_rng([seed, 1]).permutation(len(rows))[: config.num_removed]),
        )
    ]
    announce(folder, trainer, [training for _, training in trainings])
    losses: dict[str, list[float]] = {ALL: [], TOP: [], RANDOM: []}
    images: dict[str, list[np.ndarray]] = {ALL: [], TOP: [], RANDOM: []}
    for number, (variant, training) in enumerate(trainings, start=1):
        label = f"{variant}, seed {training.seed} ({number} of {len(trainings)})"
        tuned = trainer.model(folder / training_key(training), training, label)
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


def announce(folder: Path, trainer: Trainer, trainings: Sequence[Training]) -> None:
    """Prints how many models are left to train, and how long that takes by the measured time of a step."""
    missing = {key for key in map(training_key, trainings) if not trainer.is_trained(folder / key)}
    if not missing:
        print(f"all {len(trainings)} {trainer.noun} are there")
        return
    seconds = trainer.seconds_per_step()
    minutes = len(missing) * trainer.steps * seconds / 60
    print(
        f"{len(missing)} of {len(trainings)} {trainer.noun} to train, {trainer.steps} steps each at {seconds:.3g} s: "
        f"about {minutes:.3g} minutes",
        flush=True,
    )


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
