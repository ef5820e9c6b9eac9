"""Flow matching (arXiv 2210.02747, 2403.03206): noise levels on a straight line, and Euler sampling along it.

A `FlowSchedule` stands where a `NoiseSchedule` does: losses, curvature and unlearning call the same methods. Sampling
follows diffusers' FlowMatchEulerDiscreteScheduler.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.diffusion.losses import Predict
from attrib_jax.ops.matmul_precision import full_precision_matmuls

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
# How the losses of a sum over timesteps are weighted, by the noise level s (arXiv 2403.03206, section 3.1):
# uniform: 1. logit_normal: the density of the levels in training, that of a standard normal's sigmoid.
# cosmap: 2 / (pi (1 - 2 s + 2 s^2)). sigma_sqrt: 1 / s^2, diffusers' name.
WEIGHTINGS = ("uniform", "logit_normal", "cosmap", "sigma_sqrt")

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "loss_weighting": "uniform",
}
_OFF = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")


@flax.struct.dataclass
class FlowSchedule:
    """Noise levels of a flow-matching model, whose prediction is the velocity, noise - latents.

    Timestep t = 0 .. T-1 is the noise level sigma = (t + 1) / T, of which the model is told 1000 sigma: the levels that
    training draws from, without a sampler's shift. An object without arrays, static under `jit`.

    Attributes:
      num_train_timesteps: T.
      shift: static shift of a sampler's levels.
      use_dynamic_shifting: whether a sampler's shift depends on the number of image tokens instead.
      base_shift, max_shift, base_image_seq_len, max_image_seq_len: that shift is a line through these two points.
      shift_terminal: a sampler's last level above 0; None for what the shift gives.
      time_shift_type: "exponential" or "linear", the form of the dynamic shift.
      loss_weighting: one of `WEIGHTINGS`; an entry of our own in the config.
      uniform_sigmas: whether a sampler's levels before the shift are 1, 1 - 1/S, ..., 1/S (FLUX) instead of S levels
        from the largest to the smallest of training (SD 3).
      config_json: the scheduler_config.json that this was read from, kept so that it can be written back.
    """

    num_train_timesteps: int = flax.struct.field(pytree_node=False)
    shift: float = flax.struct.field(pytree_node=False)
    use_dynamic_shifting: bool = flax.struct.field(pytree_node=False)
    base_shift: float = flax.struct.field(pytree_node=False)
    max_shift: float = flax.struct.field(pytree_node=False)
    base_image_seq_len: int = flax.struct.field(pytree_node=False)
    max_image_seq_len: int = flax.struct.field(pytree_node=False)
    shift_terminal: float | None = flax.struct.field(pytree_node=False)
    time_shift_type: str = flax.struct.field(pytree_node=False)
    loss_weighting: str = flax.struct.field(pytree_node=False)
    config_json: str = flax.struct.field(pytree_node=False)
    uniform_sigmas: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowSchedule":
        """Reads the content of a scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler.

        Raises:
          ValueError: another class, an option that is not supported, or a value out of range.
        """
        name = config.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise ValueError(f"scheduler config: _class_name is {name!r}; expected {CLASS_NAME!r}")
        for key in _OFF:
            if config.get(key):
                raise ValueError(f"scheduler config: {key} is {config[key]!r}; supported: False")
        settings = {**_DEFAULTS, **{key: config[key] for key in _DEFAULTS if key in config}}
        for key, choices in (("time_shift_type", ("exponential", "linear")), ("loss_weighting", WEIGHTINGS)):
            if settings[key] not in choices:
                raise ValueError(f"scheduler config: {key} is {settings[key]!r}; expected one of {', '.join(choices)}")
        for key in ("num_train_timesteps", "shift"):
            if not settings[key] > 0:
                raise ValueError(f"scheduler config: {key} is {settings[key]!r}; expected more than 0")
        if settings["base_image_seq_len"] == settings["max_image_seq_len"]:
            raise ValueError(
                f"scheduler config: base_image_seq_len and max_image_seq_len are both {settings['max_image_seq_len']}; "
                "expected two numbers of tokens"
            )
        return cls(**settings, config_json=json.dumps(dict(config), sort_keys=True))

    def to_config(self) -> dict[str, Any]:
        """The scheduler_config.json content that `from_config` was given."""
        return json.loads(self.config_json)

    @property
    def prediction_type(self) -> str:
        """What the model predicts."""
        return "flow"

    def add_noise(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """(1 - sigma) latents + sigma noise; shapes as in `NoiseSchedule.add_noise`, and so is NaN out of range."""
        sigmas = self._sigmas(timesteps)
        if sigmas.shape != noise.shape[: sigmas.ndim]:
            raise ValueError(
                f"noise has shape {noise.shape}; expected it to start with the shape of timesteps, {sigmas.shape}"
            )
        dtype = jnp.result_type(latents, noise)
        sigmas = sigmas.reshape(sigmas.shape + (1,) * (noise.ndim - sigmas.ndim))
        return (1 - sigmas).astype(dtype) * latents + sigmas.astype(dtype) * noise

    def target(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """noise - latents, at every noise level."""
        return noise - latents

    def model_timesteps(self, timesteps: jax.Array) -> jax.Array:
        """What the model is told at these timesteps, 1000 sigma, float32."""
        return self._levels(timesteps, 1000)

    def loss_weights(self, timesteps: jax.Array) -> jax.Array | None:
        """Weight of the loss at each timestep, float; None where all are 1."""
        sigmas = self._sigmas(timesteps)
        if self.loss_weighting == "logit_normal":
            # The density is 0 at a level of 1.
            inside = jnp.where(sigmas < 1, sigmas, 0.5)
            logits = jnp.log(inside / (1 - inside))
            density = jnp.exp(-jnp.square(logits) / 2) / (math.sqrt(2 * math.pi) * inside * (1 - inside))
            return jnp.where(sigmas < 1, density, 0)
        if self.loss_weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * jnp.square(sigmas)))
        return None if self.loss_weighting == "uniform" else sigmas**-2

    def _sigmas(self, timesteps):
        return self._levels(timesteps, 1)

    def _levels(self, timesteps, scale):
        # Read from a table, so that no two programs round the division otherwise.
        levels = scale * np.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps
        table = jnp.asarray(levels.astype(np.float32))
        timesteps = jnp.asarray(timesteps)
        return table.at[timesteps].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def flow_sigmas(schedule: FlowSchedule, num_steps: int, image_tokens: int) -> np.ndarray:
    """The noise levels that an Euler sampler visits, from the largest to 0 -> float32 (num_steps + 1,).

    Those of diffusers' `set_timesteps` as its pipelines call it.

    Args:
      schedule: shift and its kind.
      num_steps: sampling steps, at least 1.
      image_tokens: tokens of the image, which the dynamic shift depends on: a quarter of the pixels of the latents.

    Raises:
      ValueError: `num_steps` is not a positive whole number.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; expected a whole number of at least 1")

    def static(sigmas):
        return schedule.shift * sigmas / (1 + (schedule.shift - 1) * sigmas)

    total = schedule.num_train_timesteps
    sigmas: Any
    if schedule.uniform_sigmas:
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    else:
        ends = np.array([total, 1], np.float32) / np.float32(total)
        # The static shift is part of training's levels, and is applied to those of a sampler once more.
        ends = ends if schedule.use_dynamic_shifting else static(ends)
        sigmas = np.linspace(float(ends[0]) * total, float(ends[1]) * total, num_steps) / total
    if schedule.use_dynamic_shifting:
        slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
        mu = schedule.base_shift + slope * (image_tokens - schedule.base_image_seq_len)
        factor = math.exp(mu) if schedule.time_shift_type == "exponential" else mu
        sigmas = factor / (factor + (1 / sigmas - 1))
    else:
        sigmas = static(sigmas)
    if schedule.shift_terminal:
        sigmas = 1 - (1 - sigmas) * (1 - schedule.shift_terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0).astype(np.float32)


def sample_flow(
    predict: Predict,
    params: Any,
    schedule: FlowSchedule,
    conditioning: Any,
    negative: Any,
    initial_latents: jax.Array,
    num_steps: int,
    guidance_scale: float,
) -> jax.Array:
    """Draws B latents from standard normal `initial_latents` by Euler steps -> (B, h, w, c), in the input's dtype.

    x <- x + (sigma_next - sigma) prediction. Deterministic. Compiled once for each (predict, num_steps, shapes).

    Args:
      predict: the model, unbatched: (params, latents (h, w, c), 1000 sigma (), conditioning) -> (h, w, c).
      params: its parameters.
      schedule: noise levels of the sampler.
      conditioning: pytree of arrays with a leading axis B.
      negative: that of the empty prompt, with or without the axis B; may be None if `guidance_scale` is 1.0.
      initial_latents: (B, h, w, c).
      num_steps: sampling steps.
      guidance_scale: weight of classifier-free guidance; exactly 1.0 leaves out the unconditional half. The guidance
        scale that a distilled model takes as an input belongs to `conditioning`.

    Raises:
      ValueError: shapes that do not fit, or no `negative` where there is guidance.
    """
    if initial_latents.ndim != 4:
        raise ValueError(f"initial_latents has shape {initial_latents.shape}; expected (B, h, w, c)")
    count = len(initial_latents)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(conditioning)}
    if sizes != {count}:
        raise ValueError(
            f"conditioning has leading axes of {sorted(map(str, sizes))}; expected {count}, as initial_latents"
        )
    guided = not (isinstance(guidance_scale, (int, float)) and guidance_scale == 1.0)
    if guided and negative is None:
        raise ValueError(
            f"negative is None, but guidance_scale is {guidance_scale}; expected the conditioning of the empty prompt, "
            "or a guidance_scale of 1.0"
        )
    tokens = initial_latents.shape[1] * initial_latents.shape[2] // 4
    sigmas = tuple(flow_sigmas(schedule, num_steps, tokens).tolist())
    with full_precision_matmuls():
        given = negative if guided else None
        return _euler(predict, params, conditioning, given, initial_latents, guidance_scale, sigmas=sigmas)


@partial(jax.jit, static_argnames=("predict", "sigmas"))
def _euler(predict, params, conditioning, negative, latents, guidance_scale, *, sigmas):
    dtype = latents.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    guided = negative is not None
    if guided:
        conditioning = jax.tree.map(
            lambda given, empty: jnp.concatenate([jnp.broadcast_to(empty, given.shape).astype(given.dtype), given]),
            conditioning,
            negative,
        )
    batched = jax.vmap(predict, in_axes=(None, 0, None, 0))

    def body(latents, levels):
        sigma, sigma_next = levels
        inputs = jnp.concatenate([latents, latents]) if guided else latents
        output = batched(params, inputs.astype(dtype), 1000 * sigma, conditioning).astype(wide)
        if guided:
            unconditional, conditional = jnp.split(output, 2)
            output = unconditional + jnp.asarray(guidance_scale, wide) * (conditional - unconditional)
        return latents + (sigma_next - sigma) * output, None

    levels = np.array(sigmas, np.float32).astype(wide)
    latents, _ = jax.lax.scan(body, latents.astype(wide), (levels[:-1], levels[1:]))
    return latents.astype(dtype)
