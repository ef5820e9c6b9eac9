"""Mirrored unlearning (docs/METHOD.md, "Mirrored unlearning"): what to forget rises, the rest of the data is retained.

Arxiv 2605.17938. L = L_retain - lambda * mean over draws of min(L_query, L_null): ascent that stops where the model
knows of the query as little as an untrained one. Scores compare losses before and after draw by draw, under noise that
all training images share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attrib_jax.attribution.residual import shared_noise
from attrib_jax.core.checks import check_positive, check_range
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import Params, merge_weights
from attrib_jax.diffusion.losses import Predict, batch_losses, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.projected_text import text_rows
from attrib_jax.ops.micro_batching import (
    even_group_size,
    forward_pixels,
    gradient_pixels,
    group_size,
    num_pixels,
    sum_groups,
)

# Added to the sum of two losses, so that two losses of 0 have skew 0.
_SKEW_OFFSET = 1e-3
# As in training (`make_optimizer`): the global norm that gradients are clipped to.
_MAX_NORM = 1.0


class LossBatch(NamedTuple):
    """B examples, each under one (timestep, noise) draw.

    Attributes:
      latents: (B, h, w, c).
      text: (B, L, d) text states.
      timestep: (B,) int32.
      noise: (B, h, w, c) standard normal.
    """

    latents: Any
    text: Any
    timestep: Any
    noise: Any


class MirroredState(NamedTuple):
    """selected: nested dict of the weights that move; opt_state: the optimiser's state."""

    selected: Any
    opt_state: Any


class Limits(NamedTuple):
    """Bounds of the ascent, each ().

    Attributes:
      clamp: bound of each draw's forget loss, L_null.
      stop: no step is taken where the mean of clamped forget losses is `stop` or more; -inf takes none at all.
    """

    clamp: Any
    stop: Any


def noisy_timesteps(share: float, draws: int, num_train_timesteps: int) -> np.ndarray:
    """`draws` timesteps, evenly over the noisiest `share` of the schedule, rising -> (draws,) int32.

    Raises ValueError for a share outside (0, 1] or a number below 1.
    """
    check_range("share", share, np.nextafter(0, 1), 1.0)
    check_positive("draws", draws, integer=True)
    first = min(round((1 - share) * num_train_timesteps), num_train_timesteps - 1)
    middles = (np.arange(draws) + 0.5) / draws
    return (first + np.floor(middles * (num_train_timesteps - first))).astype(np.int32)


def shared_draw_losses(
    predict: Predict, schedule: NoiseSchedule, params: Params, key: jax.Array, batch: Batch, timesteps: jax.Array
) -> jax.Array:
    """Losses of each of B examples under S draws that all examples share -> (B, S).

    Compile it for one B, as `strided_losses`, and an example's losses do not depend on the others.

    Args:
      predict, schedule, params: the model.
      key: key of the noise, that of draw s a function of it and of s alone.
      batch: examples; their masks are ignored.
      timesteps: (S,) int32, one a draw; two draws may have the same.
    """
    shape, count = batch.latents.shape[1:], len(batch.row_id)
    noise = shared_noise(key, jnp.arange(len(timesteps)), shape).astype(batch.latents.dtype)

    def losses(example):
        return denoising_losses(predict, params, schedule, example.latents, example.text, noise, timesteps)

    at_once = group_size(count, num_pixels(shape) * len(timesteps), forward_pixels())
    return jax.lax.map(losses, batch, batch_size=at_once % count)  # 0 is a plain vmap


def skew_scores(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mean over draws of (L_u - L_0) / (L_u + L_0 + 1e-3), losses (..., S) of the same draws -> (...) float64.

    Larger for images whose loss rose more; between -1 and 1. Raises ValueError where the shapes differ.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"before and after have shapes {before.shape} and {after.shape}; expected the same (..., S)")
    return np.mean((after - before) / (after + before + _SKEW_OFFSET), axis=-1)


def mirrored_optimizer(learning_rate: jax.Array | float) -> optax.GradientTransformation:
    """The optimiser of training at a constant rate: Adam, gradients clipped to a global norm of 1."""
    return optax.chain(optax.clip_by_global_norm(_MAX_NORM), optax.adam(learning_rate))


def mirrored_gradient(
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Params,
    rest: Params,
    retain: LossBatch,
    forget: LossBatch,
    clamp: jax.Array | float,
    strength: jax.Array | float,
    platform: str | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """Gradient by `selected` of mean(L_retain) - strength * mean(min(L_forget, clamp)).

    Args:
      predict, schedule: the model.
      selected, rest: its parameters, those that move and the others.
      retain: training examples whose loss is to stay low.
      forget: draws of the query, or of the examples to forget.
      clamp: bound of each forget loss, L_null; a draw at the bound adds no gradient.
      strength: lambda.
      platform: platform of the devices that run it, which decides how much runs at once; JAX's default if None.

    Returns:
      The two means, the second of clamped losses, each (); and the gradient.
    """

    def objective(selected, part):
        batch, shares, clamps = part
        params = merge_weights(selected, rest)
        losses = batch_losses(predict, params, schedule, batch.latents, batch.text, batch.noise, batch.timestep)
        means = jnp.sum(shares * jnp.minimum(losses, clamps)[:, None], axis=0)
        return means[0] - strength * means[1], means

    def gradient(part):
        pixels = num_pixels(part[0].latents.shape[1:])
        size = even_group_size(len(part[1]), pixels, gradient_pixels(platform))
        return sum_groups(functools.partial(jax.grad(objective, has_aux=True), selected), part, size)

    parts = []
    for column, (batch, bound) in enumerate(((retain, jnp.inf), (forget, clamp))):
        count = len(batch.timestep)
        shares = jnp.zeros((count, 2)).at[:, column].set(1 / count)
        parts.append((batch, shares, jnp.full(count, bound)))
    if jnp.shape(text_rows(retain.text))[1:] == jnp.shape(text_rows(forget.text))[1:]:
        # One program is compiled, and runs, faster than two.
        parts = [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)]
    total, losses = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *map(gradient, parts))
    return (losses[0], losses[1]), total


def mirrored_step(
    predict: Predict,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    rest: Params,
    retain: LossBatch,
    forget: LossBatch,
    state: MirroredState,
    limits: Limits,
    strength: jax.Array | float,
    platform: str | None = None,
) -> tuple[MirroredState, jax.Array, tuple[jax.Array, jax.Array]]:
    """One step -> the state after it, whether it was taken (), and the two losses before it, see `mirrored_gradient`.

    Where `limits` allow no step the state stays as it is, bitwise.
    """
    selected, opt_state = state
    losses, gradient = mirrored_gradient(
        predict, schedule, selected, rest, retain, forget, limits.clamp, strength, platform
    )
    updates, new_opt_state = optimizer.update(gradient, opt_state, selected)
    taken = losses[1] < limits.stop
    new = MirroredState(optax.apply_updates(selected, updates), new_opt_state)
    return jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, state), taken, losses
