"""The linearised score: the derivative of each example's strided loss along the change of the weights.

The change is what unlearning made of a query, new weights less old. There is no base loss and no difference of
near-equal numbers; as the change shrinks, the score becomes the exact one (METHOD.md section 4).
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attrib_jax.attribution.influence import influence_matrix
from attrib_jax.attribution.scores import example_loss, strided_losses
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import Params, merge_weights, select_weights
from attrib_jax.diffusion.losses import Predict
from attrib_jax.jobs.context import Run, run_mesh
from attrib_jax.jobs.losses import ExampleProgram, dataset_pass, shares_noise
from attrib_jax.jobs.settings import LossSettings
from attrib_jax.models.predictor import cast_params, predictor
from attrib_jax.ops.micro_batching import GRADIENT_PIXELS, even_group_size, num_pixels
from attrib_jax.ops.shards import gather
from attrib_jax.parallel.hosts import on_host_memory
from attrib_jax.parallel.mesh import num_parts

# UNet forwards whose activations the reverse mode holds at once, and their latent pixels.
_FORWARDS_AT_ONCE = 40
_PIXELS_AT_ONCE = 4 * GRADIENT_PIXELS


def linear_pass(
    run: Run,
    paths: Sequence[Path],
    changes: Sequence[Params],
    weights: str,
    config: LossSettings,
    description: str,
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Linearised scores of the data set for each query (N, flips), in one pass.

    One query takes forward mode, at about the cost of two forwards an example. Several take reverse mode: one gradient
    an example, dotted with every change, which costs about as much, however many there are. The two agree up to
    rounding.

    Args:
      run, paths, description, rows: as in `dataset_pass`.
      changes: the weight change of each query, nested dicts like the weights of the subset `weights`.
      weights: name of that subset.
      config: how losses are taken.
    """
    program = linear_program(run, config, len(changes))
    stacked = changes[0] if len(changes) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *changes)
    # The weights are rounded inside of what is differentiated, so each change too is rounded only where the precision
    # rounds its weight.
    selected, _ = run.select(weights)
    with contextlib.nullcontext() if num_parts(program.mesh) == 1 else on_host_memory():
        _, rest = select_weights(cast_params(run.pipeline.params["unet"], config.precision), weights)
    weights_and_change = program.place((selected, rest, stacked))
    return dataset_pass(run, paths, program, [weights_and_change], description, rows, check_device=False)


def linear_program(run: Run, config: LossSettings, num_queries: int) -> ExampleProgram:
    """The compiled linearised score; its weights are `(selected, rest, change)`, of several queries stacked changes.

    `selected` and `change` are in float32, `rest` in any precision.
    """
    common = shares_noise(config)
    static = (predictor(run.pipeline.unet, config.precision), config.precision, common)
    function, shape = (linear_scores, ()) if num_queries == 1 else (linear_scores_of_queries, (num_queries,))
    return ExampleProgram(
        function, run.pipeline.schedule, config, run_mesh(run.pipeline, config), shape, static=static,
        shared_noise=common, takes_shards=True,
    )  # fmt: skip


def linear_scores(predict: Predict, precision: str, common: bool, shared: Any, batch: Batch) -> jax.Array:
    """Scores (B,) of a tile for one query, in forward mode; `shared` is (schedule, key, timesteps, weights).

    `common`: whether all examples share their noise.
    """
    schedule, key, timesteps, (selected, rest, change) = shared

    def losses(selected):
        params = cast_params(merge_weights(selected, rest), precision)
        return strided_losses(predict, schedule, params, key, batch, timesteps, shared=common)

    return jax.jvp(losses, (selected,), (change,))[1]


def linear_scores_of_queries(predict: Predict, precision: str, common: bool, shared: Any, batch: Batch) -> jax.Array:
    """Scores (B, Q) of a tile for several queries, in reverse mode; arguments as in `linear_scores`."""
    schedule, key, timesteps, (selected, rest, changes) = shared
    # An example's gradient is multiplied by every change before anything is added up.
    selected, changes = gather((selected, changes))

    def loss(selected, rest, example):
        params = cast_params(merge_weights(selected, rest), precision)
        return example_loss(predict, schedule, params, key, example, timesteps, shared=common)

    forwards = min(_FORWARDS_AT_ONCE, _PIXELS_AT_ONCE // num_pixels(batch.latents.shape[1:]))
    # A divisor of the tile, so that no group is smaller than the others.
    at_once = even_group_size(len(batch.row_id), len(timesteps), forwards)
    return influence_matrix(loss, selected, rest, batch, changes, at_once)


def weight_change(moved: Params, selected: Params) -> Params:
    """Change of each weight by unlearning: a nested dict like `selected`."""

    def subtract(new, old):
        # Weights that are in the host's memory may have no room on one device.
        return new - (np.asarray(old) if isinstance(new, np.ndarray) else old)

    return jax.tree.map(subtract, moved, selected)
