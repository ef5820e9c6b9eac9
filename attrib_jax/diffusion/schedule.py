"""The forward diffusion process: noise levels read from a diffusers scheduler_config.json.

`alphas_cumprod` is bitwise identical to diffusers' float32 values: `torch.linspace` rounds each beta once, and
`torch.cumprod` multiplies in double precision and rounds each product once, so both are done here in float64. With
`rescale_betas_zero_snr` it is within 5e-7 of theirs: the betas are rescaled in steps that round otherwise.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_PREDICTION_TYPES = ("epsilon", "v_prediction")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "trailing", "linspace")

# What diffusers assumes for a key that a scheduler_config.json leaves out.
_BASE_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
_ANCESTRAL = {"timestep_spacing": "leading", "clip_sample": True}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
_CONSISTENCY = {**_NARROW, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _ANCESTRAL,
    "DDIMParallelScheduler": _ANCESTRAL,
    "DDIMInverseScheduler": _ANCESTRAL,
    "DDPMScheduler": _ANCESTRAL,
    "DDPMParallelScheduler": _ANCESTRAL,
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "LCMScheduler": _CONSISTENCY,
    "TCDScheduler": _CONSISTENCY,
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
}
# These classes keep the last noise level of a zero-SNR schedule a little above 0 (2^-24), the others put it at 0.
_POSITIVE_TERMINAL = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


@flax.struct.dataclass
class NoiseSchedule:
    """Noise levels of a diffusion model and what the model predicts, as a pytree with one array leaf.

    Attributes:
        alphas_cumprod: (T,) float32, the share of signal variance left at each training timestep.
        prediction_type: "epsilon" (the model predicts the noise) or "v_prediction".
        num_train_timesteps: T.
        set_alpha_to_one: whether DDIM's last step lands on a noise level of zero (else on that of timestep 0).
        steps_offset: added to the sampling timesteps when `timestep_spacing` is "leading".
        timestep_spacing: "leading", "trailing" or "linspace".
        clip_sample: whether a sampler clips its estimate of the clean latents to +-`clip_sample_range`.
        config_json: the scheduler_config.json that this was read from, kept so that it can be written back.
    """

    alphas_cumprod: jax.Array
    prediction_type: str = flax.struct.field(pytree_node=False)
    num_train_timesteps: int = flax.struct.field(pytree_node=False)
    set_alpha_to_one: bool = flax.struct.field(pytree_node=False)
    steps_offset: int = flax.struct.field(pytree_node=False)
    timestep_spacing: str = flax.struct.field(pytree_node=False)
    clip_sample: bool = flax.struct.field(pytree_node=False)
    clip_sample_range: float = flax.struct.field(pytree_node=False)
    config_json: str = flax.struct.field(pytree_node=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads the content of a scheduler_config.json of any scheduler class with discrete betas.

        Absent keys take the defaults of the class in `_class_name` (DDIMScheduler's if that is absent too). Of a class
        that is not known, `beta_start`, `beta_end` and `beta_schedule` (or `trained_betas`) must be present.

        Raises:
            ValueError: an unsupported prediction type, beta schedule or timestep spacing; an unknown class without
                betas; betas outside [0, 1] or of the wrong number.
        """
        name = config.get("_class_name", "DDIMScheduler")
        if name not in _CLASS_DEFAULTS and config.get("trained_betas") is None:
            missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in config]
            if missing:
                raise ValueError(
                    f"scheduler config: the class {name!r} is not known and the config lacks {', '.join(missing)}; "
                    "expected a scheduler with discrete betas, such as DDIMScheduler. Flow-matching and EDM models "
                    "are trained with another loss and are not supported."
                )
        given = {key: config[key] for key in _BASE_DEFAULTS if key in config}
        settings = {**_BASE_DEFAULTS, **_CLASS_DEFAULTS.get(name, {}), **given}
        _check_choice("prediction_type", settings["prediction_type"], _PREDICTION_TYPES)
        _check_choice("timestep_spacing", settings["timestep_spacing"], _SPACINGS)
        alphas_cumprod = _alphas_cumprod(settings)
        if settings["rescale_betas_zero_snr"] and name in _POSITIVE_TERMINAL:
            alphas_cumprod[-1] = 2.0**-24
        return cls(
            alphas_cumprod=jnp.asarray(alphas_cumprod),
            prediction_type=settings["prediction_type"],
            num_train_timesteps=int(settings["num_train_timesteps"]),
            set_alpha_to_one=bool(settings["set_alpha_to_one"]),
            steps_offset=int(settings["steps_offset"]),
            timestep_spacing=settings["timestep_spacing"],
            clip_sample=bool(settings["clip_sample"]),
            clip_sample_range=float(settings["clip_sample_range"]),
            config_json=json.dumps(dict(config), sort_keys=True, default=np.ndarray.tolist),
        )

    def to_config(self) -> dict[str, Any]:
        """The scheduler_config.json content that `from_config` was given."""
        return json.loads(self.config_json)

    def add_noise(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """sqrt(abar_t) latents + sqrt(1 - abar_t) noise (METHOD.md section 2).

        `noise` (*timesteps.shape, ...) has the shape of the result and `latents` broadcasts against it, so timesteps
        may be () for one example, (B,) for a batch, or (S,) for one latent (h, w, c) at S noise levels. A timestep
        outside of 0..T-1 gives NaN. In the promoted dtype of latents and noise, the two factors rounded to it last.
        """
        signal, spread = self._coefficients(latents, noise, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """What the model is trained to output: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) latents.

        Shapes as in `add_noise`.
        """
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._coefficients(latents, noise, timesteps)
        return signal * noise - spread * latents

    def model_timesteps(self, timesteps: jax.Array) -> jax.Array:
        """What the model is told at these timesteps: they themselves."""
        return timesteps

    def loss_weights(self, timesteps: jax.Array) -> jax.Array | None:
        """Weight of the loss at each timestep: None, as all are 1."""
        return None

    def _coefficients(self, latents, noise, timesteps):
        timesteps = jnp.asarray(timesteps)
        if timesteps.shape != noise.shape[: timesteps.ndim]:
            raise ValueError(
                f"noise has shape {noise.shape}; expected it to start with the shape of timesteps, {timesteps.shape}"
            )
        # A clamped index would silently score another noise level: an out-of-range timestep reads NaN instead.
        alphas = self.alphas_cumprod.at[timesteps].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        dtype = jnp.result_type(latents, noise)
        # In half precision 1 - abar of the first timesteps would be 0.
        alphas = alphas.astype(jnp.promote_types(dtype, jnp.float32))
        alphas = alphas.reshape(timesteps.shape + (1,) * (noise.ndim - timesteps.ndim))
        return jnp.sqrt(alphas).astype(dtype), jnp.sqrt(1 - alphas).astype(dtype)


def strided_timesteps(stride: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """Timesteps of the strided loss sum, 0, stride, 2 stride, ... below T (METHOD.md section 2) -> int32 (S,).

    S = ceil(T / stride). A stride that does not divide T keeps every gap at `stride` and leaves a shorter remainder
    after the last timestep: 300 gives 0, 300, 600, 900.

    Raises:
        ValueError: `stride` is not an integer from 1 to T.
    """
    if isinstance(stride, bool) or not isinstance(stride, (int, np.integer)) or not 1 <= stride <= num_train_timesteps:
        raise ValueError(
            f"stride is {stride!r}; expected an integer from 1 to {num_train_timesteps}, the number of training "
            "timesteps (50 gives 20 timesteps of 1000)"
        )
    return np.arange(0, num_train_timesteps, stride, dtype=np.int32)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"scheduler config: {name} is {value!r}; expected one of {', '.join(choices)}")


def _alphas_cumprod(settings: Mapping[str, Any]) -> np.ndarray:
    """diffusers' alphas_cumprod, (T,) float32."""
    count = int(settings["num_train_timesteps"])
    if count < 1:
        raise ValueError(f"scheduler config: num_train_timesteps is {count}; expected at least 1")
    start, end = float(settings["beta_start"]), float(settings["beta_end"])
    if settings["trained_betas"] is not None:
        betas = np.asarray(settings["trained_betas"], np.float32)
        if betas.shape != (count,):
            raise ValueError(
                f"scheduler config: trained_betas has shape {betas.shape}; expected ({count},), one beta for each of "
                "num_train_timesteps"
            )
    elif settings["beta_schedule"] == "linear":
        betas = _linspace(start, end, count)
    elif settings["beta_schedule"] == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, count) ** 2
    elif settings["beta_schedule"] == "squaredcos_cap_v2":
        betas = _cosine_betas(count)
    else:
        _check_choice("beta_schedule", settings["beta_schedule"], _BETA_SCHEDULES)
    if not np.all((betas >= 0) & (betas <= 1)):
        raise ValueError(
            f"scheduler config: betas run from {betas.min()} to {betas.max()}; expected values in [0, 1]. Check "
            "beta_start, beta_end or trained_betas."
        )
    if settings["rescale_betas_zero_snr"]:
        betas = _rescale_zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """torch.linspace in float32: a float32 step, counted from the nearer end, each value rounded once."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    """torch.cumprod of float32 values on a CPU: a float64 running product, each entry rounded to float32."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _cosine_betas(count: int, max_beta: float = 0.999) -> np.ndarray:
    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), max_beta) for i in range(count)]
    return np.array(betas, np.float32)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) so that its last value is 0 (arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(_cumprod(np.float32(1) - betas))
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    squares = roots**2
    return np.float32(1) - np.concatenate([squares[:1], squares[1:] / squares[:-1]])
