"""The denoising loss of one example at given timesteps and noise: the quantity that attribution differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.ops.matmul_precision import float32_products
from attrib_jax.ops.micro_batching import FORWARD_PIXELS, group_size, map_groups, num_pixels

# predict(params, noisy_latents (h, w, c), timestep (), text (L, d)) -> model output (h, w, c)
# It may have an attribute `of_batch`, a faster form for several: attrib_jax/models/unet.py:predictor.
Predict = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


@float32_products
def denoising_losses(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Mean squared error of the model's prediction at each timestep, for one example (METHOD.md sections 2 and 5).

    The model runs on all timesteps with one text, so that what depends only on the text (the cross-attention keys and
    values) is computed once: by `predict.of_batch` where there is one (`predictor`), else under `vmap`.

    Args:
        predict: the model, see `Predict`; unbatched.
        params: its parameters, the argument to differentiate by.
        schedule: noise levels and prediction type.
        latents: (h, w, c), clean, multiplied by the autoencoder's scaling factor.
        text: (L, d) text states.
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
    errors = _squared_errors(prediction, target)
    latent_axes = tuple(range(1, errors.ndim))
    if mask is None:
        return jnp.mean(errors, axis=latent_axes)
    weights = _mask_weights(mask, latents.shape).astype(errors.dtype)
    size = jnp.sum(weights) * latents.shape[-1]
    return jnp.sum(weights * errors, axis=latent_axes) / jnp.where(size > 0, size, 1)


@float32_products
def predictions(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the model predicts for one example at each timestep, and what it should -> two arrays (S, h, w, c).

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
    size = group_size(len(timesteps), num_pixels(latents.shape), FORWARD_PIXELS)

    def at_timesteps(inputs):
        return _at_timesteps(predict)(params, *inputs, text)

    # Of groups that follow each other a backward pass would keep all activations: it computes them again.
    at_timesteps = at_timesteps if size == len(timesteps) else jax.checkpoint(at_timesteps)
    prediction = map_groups(at_timesteps, size)((noisy, timesteps))
    if prediction.shape != target.shape:
        raise ValueError(f"predict returned shape {prediction.shape[1:]}; expected that of latents, {latents.shape}")
    return prediction, target


@float32_products
def batch_losses(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: Any,
    noise: jax.Array,
    timesteps: jax.Array,
) -> jax.Array:
    """Mean squared error of each of several examples at a timestep of its own: what `denoising_losses` gives for it.

    Args:
        predict, params, schedule: as in `denoising_losses`.
        latents, noise: (B, h, w, c).
        text: (B, L, d) text states; or `ProjectedText` of them where `predict` has an `of_batch`.
        timesteps: (B,).

    Returns:
        (B,), in the dtype of `denoising_losses`.
    """
    prediction = _batched(predict)(params, schedule.add_noise(latents, noise, timesteps), timesteps, text)
    errors = _squared_errors(prediction, schedule.target(latents, noise, timesteps))
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


def _batched(predict: Predict) -> Callable[..., jax.Array]:
    """`predict` of noisy latents (B, h, w, c), timesteps (B,) and text (B, L, d) -> (B, h, w, c)."""
    return getattr(predict, "of_batch", None) or jax.vmap(predict, in_axes=(None, 0, 0, 0))


def _squared_errors(prediction, target):
    dtype = jnp.promote_types(jnp.result_type(prediction, target), jnp.float32)
    return jnp.square(prediction.astype(dtype) - target.astype(dtype))


def _at_timesteps(predict: Predict) -> Predict:
    """`predict` of several noisy latents (S, h, w, c) and timesteps (S,), with one text."""
    if not hasattr(predict, "of_batch"):
        return jax.vmap(predict, in_axes=(None, 0, 0, None))

    def at_timesteps(params, noisy_latents, timesteps, text):
        return predict.of_batch(params, noisy_latents, timesteps, jax.tree.map(lambda array: array[None], text))

    return at_timesteps


def denoising_loss(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    latents: jax.Array,
    text: jax.Array,
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
