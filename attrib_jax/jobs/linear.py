"""The linearised score: the derivative of each example's strided loss along the change of the weights.

The change is what unlearning made of a query, new weights less old. There is no base loss and no difference of
near-equal numbers; as the change shrinks, the score becomes the exact one (METHOD.md section 4).
"""

from typing import Any

import jax
from jax.sharding import Mesh

from attrib_jax.attribution.influence import influence_matrix
from attrib_jax.attribution.scores import example_loss, strided_losses
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import merge_weights
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.losses import ExampleProgram
from attrib_jax.models.precision import cast_params, matmul_precision
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel
from attrib_jax.ops.micro_batching import GRADIENT_PIXELS, even_group_size, num_pixels

# UNet forwards whose activations the reverse mode holds at once, and their latent pixels.
_FORWARDS_AT_ONCE = 40
_PIXELS_AT_ONCE = 4 * GRADIENT_PIXELS


class LinearProgram(ExampleProgram):
    """The compiled linearised score of one model; its weights are `(selected, rest, change)`.

    `selected` and `change` are nested dicts in float32 of the weights that move and of what they move by, `rest` the
    others in any precision. They are rounded inside of what is differentiated, so each change too is rounded only
    where the precision rounds its weight.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        loss_seed: int,
        stride: int,
        batch_size: int = 0,
        mesh: Mesh | None = None,
        precision: str = "float32",
        num_queries: int | None = None,
    ):
        """One query in forward mode, or `num_queries` in reverse mode.

        Forward mode gives results (rows, flips) at about the cost of two forwards. Reverse mode takes changes with a
        leading axis of `num_queries` and gives (rows, flips, num_queries): one gradient an example, dotted with every
        change, which costs about as much, however many there are. The two agree up to rounding.

        Args:
          unet: the model.
          schedule, loss_seed, stride, batch_size, mesh: as in `ExampleProgram`.
          precision: of the forward pass, see `PRECISIONS`.
          num_queries: of the reverse mode; None for forward mode.
        """
        function, shape = (_forward_mode, ()) if num_queries is None else (_reverse_mode, (num_queries,))
        static = (predictor(unet, precision), precision)
        products = matmul_precision(precision)
        super().__init__(function, schedule, loss_seed, stride, batch_size, mesh, shape, products, static=static)


def _forward_mode(predict: Predict, precision: str, schedule, key, timesteps, weights, batch: Batch) -> jax.Array:
    selected, rest, change = weights

    def losses(selected):
        params = cast_params(merge_weights(selected, rest), precision)
        return strided_losses(predict, schedule, params, key, batch, timesteps)

    return jax.jvp(losses, (selected,), (change,))[1]


def _reverse_mode(predict: Predict, precision: str, schedule, key, timesteps, weights, batch: Batch) -> jax.Array:
    selected, rest, changes = weights

    def loss(selected, rest, example):
        params = cast_params(merge_weights(selected, rest), precision)
        return example_loss(predict, schedule, params, key, example, timesteps)

    at_once = _examples_at_once(len(batch.row_id), len(timesteps), num_pixels(batch.latents.shape[1:]))
    return influence_matrix(loss, selected, rest, batch, changes, at_once)


def _examples_at_once(tile: int, num_timesteps: int, pixels: int) -> int:
    """A divisor of the tile, so that no group is smaller than the others."""
    forwards = min(_FORWARDS_AT_ONCE, _PIXELS_AT_ONCE // pixels)
    return even_group_size(tile, num_timesteps, forwards)


def weight_change(moved: Any, selected: Any) -> Any:
    """What unlearning moved each weight by: a nested dict like `selected`."""
    return jax.tree.map(lambda new, old: new - old, moved, selected)
