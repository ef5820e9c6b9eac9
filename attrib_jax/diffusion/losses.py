"""The denoising loss of one example at given timesteps and noise: the quantity that attribution differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import as_predictor
from attrib_jax.ops.matmul_precision import full_precision_matmuls
from attrib_jax.ops.micro_batching import FORWARD_PIXELS, group_size, map_groups, num_pixels

# predict(params, noisy_latents (h, w, c), timestep (), text) -> model output (h, w, c): an `attrib_jax.Predictor` or a
# plain function. `text` is what the model is conditioned on, a pytree; for Stable Diffusion 1 and 2 text states (L, d).
Predict = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]


def denoising_losses(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: Any,
    noise: jax.Array,
    timesteps: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Mean squared error of the model's prediction at each timestep, for one example (METHOD.md sections 2 and 5).

    The model runs on all timesteps with one text, so that what depends only on the text (the cross-attention keys and
    values) is computed once.

    Args:
        predict: model, see `Predict`.
        params: its parameters, the argument to differentiate by.
        schedule: noise levels, prediction type and weights of the losses: a `NoiseSchedule` or a `FlowSchedule`.
        latents: (h, w, c), clean, multiplied by the autoencoder's scaling factor.
        text: (L, d) text states, or the pytree that the model is conditioned on, without a batch axis.
        noise: (S, h, w, c) standard normal, see `example_noise`.
        timesteps: (S,) integers from 0 and below `schedule.num_train_timesteps`; others give NaN.
        mask: (h, w) or (h, w, 1) weights in [0, 1]. The loss is then the sum of weighted squared errors divided by
            (sum of the weights x c); a mask of zeros gives 0, so refuse one before calling.

    Returns:
        (S,), float32, or float64 if the model computes in float64.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    prediction, target = predictions(predict, params, schedule, latents, text, noise, timesteps)
    errors = _weighted_errors(schedule, prediction, target, timesteps)
    latent_axes = tuple(range(1, errors.ndim))
    if mask is None:
        return jnp.mean(errors, axis=latent_axes)
    weights = _mask_weights(mask, latents.shape).astype(errors.dtype)
    size = jnp.sum(weights) * latents.shape[-1]
    return jnp.sum(weights * errors, axis=latent_axes) / jnp.where(size > 0, size, 1)


def predictions(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: Any,
    noise: jax.Array,
    timesteps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The model's prediction for one example at each timestep, and its target -> two arrays (S, h, w, c).

    Arguments and errors as in `denoising_losses`.
    """
    timesteps = jnp.asarray(timesteps)
    if latents.ndim != 3:
        raise ValueError(f"latents has shape {latents.shape}; expected (h, w, c), those of one example")
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps has shape {timesteps.shape}; expected (S,)")
    if noise.shape != (*timesteps.shape, *latents.shape):
        raise ValueError(
            f"noise has shape {noise.shape}; expected (S, *latents.shape) = {(*timesteps.shape, *latents.shape)}"
        )
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    timesteps = schedule.model_timesteps(timesteps)
    text = jax.tree.map(lambda leaf: leaf[None], text)
    at_once = group_size(len(timesteps), num_pixels(latents.shape), FORWARD_PIXELS)
    predict = as_predictor(predict)
    with full_precision_matmuls():
        if at_once == len(timesteps):
            prediction = predict.batched(params, noisy, timesteps, text)
        else:
            # A backward pass would keep the activations of all groups of timesteps: it computes them again instead.
            group = jax.checkpoint(lambda inputs: predict.batched(params, inputs[0], inputs[1], text))
            prediction = map_groups(group, at_once, (noisy, timesteps))
    if prediction.shape != target.shape:
        raise ValueError(f"predict returned shape {prediction.shape[1:]}; expected {latents.shape}, as latents")
    return prediction, target


def batch_losses(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: Any,
    noise: jax.Array,
    timesteps: jax.Array,
) -> jax.Array:
    """Mean squared error of each of several examples at a timestep of its own, equal to its `denoising_losses`.

    Args:
        predict, params, schedule: as in `denoising_losses`.
        latents, noise: (B, h, w, c).
        text: (B, L, d) text states, or the pytree that the model is conditioned on, with a leading axis B.
        timesteps: (B,).

    Returns:
        (B,), in the dtype of `denoising_losses`.
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    with full_precision_matmuls():
        prediction = as_predictor(predict).batched(params, noisy, schedule.model_timesteps(timesteps), text)
    errors = _weighted_errors(schedule, prediction, schedule.target(latents, noise, timesteps), timesteps)
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


def _weighted_errors(schedule, prediction, target, timesteps):
    dtype = jnp.promote_types(jnp.result_type(prediction, target), jnp.float32)
    errors = jnp.square(prediction.astype(dtype) - target.astype(dtype))
    weights = schedule.loss_weights(jnp.asarray(timesteps))
    return errors if weights is None else errors * weights.reshape(-1, 1, 1, 1).astype(dtype)


def denoising_loss(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: Any,
    noise: jax.Array,
    timesteps: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The mean of `denoising_losses` over the timesteps -> (); arguments and errors as there."""
    return jnp.mean(denoising_losses(predict, params, schedule, latents, text, noise, timesteps, mask=mask))


def _mask_weights(mask, latents_shape):
    mask = jnp.asarray(mask)
    if mask.shape == latents_shape[:-1]:
        mask = mask[..., None]
    if mask.shape != (*latents_shape[:-1], 1):
        raise ValueError(
            f"mask has shape {mask.shape}; expected {latents_shape[:-1]} or {(*latents_shape[:-1], 1)}, one weight for "
            "each latent pixel"
        )
    return mask
