"""DDIM and DDPM sampling with classifier-free guidance, one `lax.scan` over the steps.

The timesteps and update rules are those of diffusers' DDIMScheduler and DDPMScheduler. Latents are the model's own,
unscaled: divide by the autoencoder's scaling factor before decoding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.ops.matmul_precision import full_precision_matmuls

SAMPLERS = ("ddim", "ddpm")


def sample(
    predict: Predict,
    params: Any,
    schedule: NoiseSchedule,
    text: Any,
    negative_text: Any,
    initial_latents: jax.Array,
    num_steps: int,
    guidance_scale: float,
    *,
    sampler: str = "ddim",
    eta: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Draws B latents from standard normal `initial_latents` -> (B, h, w, c), unscaled, in the dtype of the input.

    Each step takes model output = uncond + guidance_scale (cond - uncond), both from one batched call. A
    `guidance_scale` of exactly 1.0 given as a number leaves out the unconditional half. Compiled once for each
    (predict, num_steps, sampler, shapes): pass the same `predict` object to reuse it. May be called inside `jit` if
    `predict`, `num_steps` and `sampler` are static there.

    Args:
        predict: the model, unbatched: (params, latents (h, w, c), timestep (), text (L, d)) -> (h, w, c).
        params: its parameters.
        schedule: noise levels, prediction type, timestep spacing and clipping.
        text: (B, L, d) text states, or the pytree that the model is conditioned on, with leaves (B, ...).
        negative_text: (L, d) or (B, L, d), states of the empty prompt, or a pytree in the layout of `text`, each leaf
            with or without its axis B; may be None if `guidance_scale` is 1.0.
        initial_latents: (B, h, w, c).
        num_steps: sampling steps, from 1 to T.
        guidance_scale: weight of classifier-free guidance (arXiv 2207.12598; 1.0 is none).
        sampler: "ddim" (arXiv 2010.02502, equations 12 and 16) or "ddpm" (arXiv 2006.11239, equation 7, ancestral,
            the smaller of the two fixed variances).
        eta: DDIM's share of fresh noise: 0 is deterministic; must stay 0 for "ddpm".
        key: needed when noise is drawn ("ddpm", or eta above 0). Image b at step s (0 is the noisiest) uses
            fold_in(fold_in(key, b), s) for its float32 noise, whatever the batch size.

    Raises:
        ValueError: an argument out of range, shapes that do not fit, a missing `key` or `negative_text`, or a schedule
            that these samplers cannot follow.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    _check_schedule(schedule, sampler)
    _check_shapes(text, negative_text, initial_latents)
    guided = not (_is_number(guidance_scale) and guidance_scale == 1.0)
    if guided and negative_text is None:
        raise ValueError(
            f"negative_text is None, but guidance_scale is {guidance_scale}; expected the text states of the empty "
            "prompt, or a guidance_scale of 1.0"
        )
    if _is_number(eta) and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number from 0 (deterministic) to 1")
    no_eta = _is_number(eta) and eta == 0
    if sampler == "ddpm" and not no_eta:
        raise ValueError(f"eta is {eta}, but sampler is 'ddpm', which has no such setting; expected 0")
    noisy = sampler == "ddpm" or not no_eta
    if noisy and key is None:
        raise ValueError(f"key is None, but sampler {sampler!r} with eta {eta} draws noise; pass a random key")
    with full_precision_matmuls():
        return _sample(
            predict,
            params,
            schedule,
            text,
            negative_text if guided else None,
            initial_latents,
            guidance_scale,
            eta,
            key if noisy else None,
            timesteps=tuple(ddim_timesteps(schedule, num_steps).tolist()),
            sampler=sampler,
        )


def ddim_timesteps(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """The timesteps that a sampler visits, noisiest first -> int32 (num_steps,); diffusers' `set_timesteps`.

    "leading": multiples of T // num_steps from 0, plus `steps_offset`; "trailing": T - 1 and down by T / num_steps;
    "linspace": evenly from T - 1 to 0. DDPM uses the same.

    Raises:
        ValueError: `num_steps` is not an integer from 1 to T, or `steps_offset` moves a timestep to T or beyond.
    """
    total = schedule.num_train_timesteps
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or not 1 <= num_steps <= total:
        raise ValueError(
            f"num_steps is {num_steps!r}; expected an integer from 1 to {total}, the number of training timesteps"
        )
    if schedule.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, num_steps).round()[::-1]
    elif schedule.timestep_spacing == "leading":
        timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + schedule.steps_offset
    else:
        # The range ends at a rounding error away from 0, so for some counts it has one value too many: cut it.
        timesteps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
    if timesteps[0] >= total:
        raise ValueError(
            f"num_steps is {num_steps}, which with the schedule's steps_offset {schedule.steps_offset} starts at "
            f"timestep {timesteps[0]} of {total}; use fewer steps or a steps_offset of 0"
        )
    return timesteps.astype(np.int32)


def ddim_step(
    schedule: NoiseSchedule,
    output: jax.Array,
    latents: jax.Array,
    alpha: jax.Array,
    alpha_previous: jax.Array,
    eta: float = 0.0,
    noise: jax.Array | None = None,
) -> jax.Array:
    """One DDIM update (arXiv 2010.02502, equations 12 and 16); `noise` None leaves the random term out.

    `output` and `latents` have one shape; `alpha` and `alpha_previous` are alphas_cumprod here and after the step. As
    in diffusers, clipping changes the estimate of the clean latents, not the noise direction.
    """
    clean, epsilon = _clean_and_noise(schedule, output, latents, alpha)
    variance = (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
    deviation = eta * jnp.sqrt(variance)
    # Rounding can take the square root's argument just below 0 at eta = 1.
    direction = jnp.sqrt(jnp.maximum(1 - alpha_previous - deviation**2, 0)) * epsilon
    latents = jnp.sqrt(alpha_previous) * clean + direction
    return latents if noise is None else latents + deviation * noise


def ddpm_step(
    schedule: NoiseSchedule,
    output: jax.Array,
    latents: jax.Array,
    alpha: jax.Array,
    alpha_previous: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """One ancestral DDPM update (arXiv 2006.11239, equation 7), arguments as in `ddim_step`.

    The variance is (1 - abar_prev) / (1 - abar) beta, diffusers' "fixed_small". `noise` must be 0 at timestep 0.
    """
    clean, _ = _clean_and_noise(schedule, output, latents, alpha)
    alpha_step = alpha / alpha_previous
    beta_step = 1 - alpha_step
    mean = jnp.sqrt(alpha_previous) * beta_step / (1 - alpha) * clean
    mean = mean + jnp.sqrt(alpha_step) * (1 - alpha_previous) / (1 - alpha) * latents
    variance = jnp.maximum((1 - alpha_previous) / (1 - alpha) * beta_step, 1e-20)
    return mean + jnp.sqrt(variance) * noise


@partial(jax.jit, static_argnames=("predict", "timesteps", "sampler"))
def _sample(
    predict, params, schedule, text, negative_text, latents, guidance_scale, eta, key, *, timesteps, sampler
) -> jax.Array:
    dtype, count = latents.dtype, latents.shape[0]
    timesteps = np.array(timesteps, np.int32)
    # A step's arithmetic in half precision would divide 0 by 0: abar of the first timesteps rounds to 1.
    wide = jnp.promote_types(dtype, jnp.float32)
    alphas, alphas_previous = (x.astype(wide) for x in _step_alphas(schedule, timesteps, sampler))
    guided = negative_text is not None
    if guided:
        text = jax.tree.map(
            lambda negative, leaf: jnp.concatenate([jnp.broadcast_to(negative, leaf.shape).astype(leaf.dtype), leaf]),
            negative_text,
            text,
        )
    batched = jax.vmap(predict, in_axes=(None, 0, None, 0))
    image_keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))

    def draw_noise(step, timestep):
        def draw(image_key):
            return jax.random.normal(jax.random.fold_in(image_key, step), latents.shape[1:], jnp.float32)

        return jnp.where(timestep > 0, jax.vmap(draw)(image_keys), 0).astype(wide)

    def body(latents, xs):
        step, timestep, alpha, alpha_previous = xs
        inputs = jnp.concatenate([latents, latents]) if guided else latents
        output = batched(params, inputs, timestep, text).astype(wide)
        latents = latents.astype(wide)
        if guided:
            unconditional, conditional = jnp.split(output, 2)
            output = unconditional + jnp.asarray(guidance_scale, wide) * (conditional - unconditional)
        noise = None if image_keys is None else draw_noise(step, timestep)
        if sampler == "ddpm":
            latents = ddpm_step(schedule, output, latents, alpha, alpha_previous, noise)
        else:
            latents = ddim_step(schedule, output, latents, alpha, alpha_previous, jnp.asarray(eta, wide), noise)
        return latents.astype(dtype), None

    xs = (np.arange(len(timesteps), dtype=np.int32), timesteps, alphas, alphas_previous)
    return jax.lax.scan(body, latents, xs)[0]


def _step_alphas(schedule, timesteps, sampler):
    """alphas_cumprod at each step and after it, each (S,)."""
    alphas = schedule.alphas_cumprod
    if sampler == "ddpm":
        previous = np.append(timesteps[1:], -1)
    else:
        # diffusers steps down by T // S even where the spacing is another ("trailing", "linspace").
        previous = timesteps - schedule.num_train_timesteps // len(timesteps)
    final = 1.0 if sampler == "ddpm" or schedule.set_alpha_to_one else alphas[0]
    return alphas[timesteps], jnp.where(previous >= 0, alphas[np.maximum(previous, 0)], final)


def _clean_and_noise(schedule, output, latents, alpha):
    """The model's estimates of the clean latents, clipped if the schedule says so, and of the noise."""
    signal, spread = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if schedule.prediction_type == "epsilon":
        clean, epsilon = (latents - spread * output) / signal, output
    else:
        clean, epsilon = signal * latents - spread * output, signal * output + spread * latents
    if schedule.clip_sample:
        clean = jnp.clip(clean, -schedule.clip_sample_range, schedule.clip_sample_range)
    return clean, epsilon


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.number))


def _check_schedule(schedule, sampler) -> None:
    config = schedule.to_config()
    if config.get("thresholding"):
        raise ValueError("schedule: thresholding is on in the scheduler config; expected off, as latents are unbounded")
    if config.get("rescale_betas_zero_snr") and schedule.prediction_type == "epsilon":
        raise ValueError(
            "schedule: rescale_betas_zero_snr with prediction_type 'epsilon' cannot be sampled, as the last timestep "
            "holds no signal to start from; expected 'v_prediction'"
        )
    variance = config.get("variance_type")
    if sampler == "ddpm" and variance not in (None, "fixed_small", "fixed_small_log"):
        raise ValueError(f"schedule: variance_type is {variance!r}; expected 'fixed_small' (or sample with 'ddim')")


def _check_shapes(text, negative_text, initial_latents) -> None:
    if initial_latents.ndim != 4:
        raise ValueError(f"initial_latents has shape {initial_latents.shape}; expected (B, h, w, c)")
    leaves, layout = jax.tree.flatten_with_path(text)
    count = initial_latents.shape[0]
    for path, leaf in leaves:
        if leaf.ndim < 1 or (not path and leaf.ndim != 3) or leaf.shape[0] != count:
            expected = f"({'B, L, d' if not path else 'B, ...'}) with B = {count}, as initial_latents"
            raise ValueError(f"text{jax.tree_util.keystr(path)} has shape {leaf.shape}; expected {expected}")
    if negative_text is None:
        return
    found: Any = jax.tree.structure(negative_text)
    if found != layout:
        raise ValueError(f"negative_text has the layout {found}; expected {layout}, as text")
    for (path, leaf), negative in zip(leaves, jax.tree.leaves(negative_text)):
        if negative.shape not in (leaf.shape, leaf.shape[1:]):
            raise ValueError(
                f"negative_text{jax.tree_util.keystr(path)} has shape {negative.shape}; expected {leaf.shape[1:]} or "
                f"{leaf.shape}, as text"
            )
