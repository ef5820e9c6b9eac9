"""Training losses and the optimiser step of the autoencoder and of the latent-diffusion model: pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from attrib_jax.diffusion.losses import Predict, batch_losses
from attrib_jax.diffusion.schedule import NoiseSchedule

# loss(params, batch, key) -> (scalar loss, dict of scalar metrics)
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """step: () int32; params: the trained tree; ema: its exponential moving average; opt_state: optax's."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, with the moving average starting at `params` (a copy, so that a step may donate the state)."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    batch: Any,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step -> new state and metrics.

    The step's randomness is `fold_in(key, step)`, so a resumed run draws what an uninterrupted one would. The moving
    average warms up as min(ema_decay, (1 + step) / (10 + step)), so that it forgets the initial weights early on.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(state.params, batch, jax.random.fold_in(key, state.step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), state.ema, params)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def make_optimizer(learning_rate: float, warmup_steps: int, total_steps: int, weight_decay: float = 0.0):
    """Adam(W) with a linear warm-up, a cosine decay to zero, and gradients clipped to a global norm of 1."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay))


def random_flips(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each of (B, H, W, C) left to right with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, images.shape[:1])
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def autoencoder_loss(
    vae, params, images, key, mse_weight: float, kl_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Error of the reconstruction from sampled latents, absolute and squared, plus the KL term to a standard normal.

    The absolute error keeps outlines sharp; the squared one minds large errors, such as a small patch of a rare colour.

    Args:
      vae: an `AutoencoderKL`.
      params: its parameters.
      images: (B, H, W, 3) uint8.
      key: for the mirroring and the latent noise.
      mse_weight: weight of the mean squared error, beside the mean absolute error's 1.
      kl_weight: weight of the KL divergence, averaged over latent values.
    """
    flip_key, noise_key = jax.random.split(key)
    images = random_flips(flip_key, images.astype(jnp.float32) / 127.5 - 1.0)
    mean, logvar = vae.apply({"params": params}, images, method=vae.encode)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key, mean.shape)
    decoded = vae.apply({"params": params}, latents, method=vae.decode)
    l1, mse = jnp.mean(jnp.abs(decoded - images)), jnp.mean(jnp.square(decoded - images))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return l1 + mse_weight * mse + kl_weight * kl, {"l1": l1, "mse": mse, "kl": kl}


class DiffusionBatch(NamedTuple):
    """latents: (B, 2, h, w, c), as is and mirrored, scaled; input_ids: (B, C, L) int32; num_captions: (B,) int32."""

    latents: Any
    input_ids: Any
    num_captions: Any


def diffusion_loss(
    predict: Predict,
    encode_text: Callable[[Any, jax.Array], jax.Array],
    schedule: NoiseSchedule,
    params: dict[str, Any],
    batch: DiffusionBatch,
    key: jax.Array,
    empty_ids: jax.Array,
    caption_dropout: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The denoising loss (METHOD.md section 2) at one random (flip, caption, t, noise) for each example.

    Args:
      predict: the unbatched UNet, see `attrib_jax.diffusion.losses.Predict`.
      encode_text: `(text_params, input_ids (B, L)) -> (B, L, d)`.
      schedule: noise levels and prediction type.
      params: `{"unet": ..., "text_encoder": ...}`; both are trained.
      batch: see `DiffusionBatch`.
      key: the step's.
      empty_ids: (L,) tokens of the empty prompt, which replaces a caption with probability `caption_dropout` for
        classifier-free guidance.
      caption_dropout: that probability.
    """
    flip_key, caption_key, drop_key, order_key, time_key, noise_key = jax.random.split(key, 6)
    size = batch.latents.shape[0]
    rows = jnp.arange(size)
    latents = batch.latents[rows, jax.random.bernoulli(flip_key, 0.5, (size,)).astype(jnp.int32)]
    caption = jax.random.randint(caption_key, (size,), 0, batch.num_captions)
    dropped = jax.random.bernoulli(drop_key, caption_dropout, (size,))
    input_ids = jnp.where(dropped[:, None], empty_ids, batch.input_ids[rows, caption])
    text = encode_text(params["text_encoder"], input_ids)
    return denoising_batch_loss(predict, schedule, params["unet"], latents, text, order_key, time_key, noise_key), {}


def denoising_batch_loss(
    predict: Predict,
    schedule: NoiseSchedule,
    params: Any,
    latents: jax.Array,
    text: jax.Array,
    order_key: jax.Array,
    time_key: jax.Array,
    noise_key: jax.Array,
) -> jax.Array:
    """The denoising loss (METHOD.md section 2) of a batch at one random (t, noise) for each example -> ().

    Args:
      predict: the unbatched UNet, see `attrib_jax.diffusion.losses.Predict`.
      schedule: noise levels and prediction type.
      params: parameters of the UNet.
      latents: (B, h, w, c), scaled.
      text: (B, L, d) text states.
      order_key, time_key, noise_key: random keys of the strata, the timesteps in them, and the noise.
    """
    size = latents.shape[0]
    # Stratified over the batch: the same marginal distribution of t with less variance of the mean loss.
    strata = (jax.random.permutation(order_key, size) + jax.random.uniform(time_key, (size,))) / size
    timesteps = jnp.minimum((strata * schedule.num_train_timesteps).astype(jnp.int32), schedule.num_train_timesteps - 1)
    noise = jax.random.normal(noise_key, latents.shape)
    return jnp.mean(batch_losses(predict, params, schedule, latents, text, noise, timesteps))
