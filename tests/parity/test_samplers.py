"""The samplers against diffusers' own DDIM and DDPM loops, from the same initial noise and a small known model."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.core.keys import purpose_key
from attrib_jax.diffusion.samplers import ddim_timesteps, sample
from attrib_jax.diffusion.schedule import NoiseSchedule

B, H, W, C, L, D = 3, 4, 5, 4, 2, 6
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
OFFSET = {**STABLE, "set_alpha_to_one": False, "steps_offset": 1}


def predict(params, noisy, timestep, text):
    context = jnp.mean(text @ params["text"], axis=0)
    return 0.7 * noisy + jnp.tanh(noisy @ params["mix"] + context + timestep.astype(noisy.dtype) / 1000)


def torch_predict(params, noisy, timestep, text):
    """The same, batched and channels first as diffusers has it."""
    hidden = noisy.movedim(1, -1)
    context = (text @ params["text"]).mean(dim=1)[:, None, None, :]
    output = 0.7 * hidden + torch.tanh(hidden @ params["mix"] + context + timestep.to(noisy.dtype) / 1000)
    return output.movedim(-1, 1)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    draw = {
        "params": {"mix": rng.normal(size=(C, C)), "text": rng.normal(size=(D, C))},
        "text": rng.normal(size=(B, L, D)),
        "negative_text": rng.normal(size=(L, D)),
        "initial_latents": rng.normal(size=(B, H, W, C)),
    }
    return jax.tree.map(np.float32, draw)


def channels_first(array):
    return torch.from_numpy(np.array(array)).movedim(-1, 1)


def diffusers_loop(scheduler, inputs, num_steps, guidance_scale, **step_arguments):
    """diffusers' sampling in the dtype of the inputs, its noise levels included."""
    latents = channels_first(inputs["initial_latents"])
    params = jax.tree.map(torch.from_numpy, inputs["params"])
    text = torch.from_numpy(inputs["text"])
    negative = torch.from_numpy(inputs["negative_text"]).expand(text.shape)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).to(latents.dtype))
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        conditional = torch_predict(params, latents, t, text)
        unconditional = torch_predict(params, latents, t, negative)
        output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents, **step_arguments).prev_sample
    return latents.movedim(1, -1).numpy()


def assert_same_images(scheduler, schedule, inputs, num_steps, **step_arguments):
    """float64 on both sides: a wrong coefficient shows far above rounding, which the steps amplify."""
    wide = jax.tree.map(np.float64, inputs)
    eta = {"eta": step_arguments["eta"]} if "eta" in step_arguments else {}
    expected = diffusers_loop(scheduler, wide, num_steps, 3.0, **eta)
    with jax.enable_x64(True):
        actual = sample(predict, schedule=schedule, num_steps=num_steps, guidance_scale=3.0, **step_arguments, **wide)
        assert actual.dtype == jnp.float64
    # Injected noise is float32, and compiled into the step its last bit may differ.
    tolerance = 1e-6 if "key" in step_arguments else 1e-9
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def image_noise(key, image, num_steps):
    key = jax.random.fold_in(key, image)
    return np.stack([jax.random.normal(jax.random.fold_in(key, s), (H, W, C), jnp.float32) for s in range(num_steps)])


def inject_noise(monkeypatch, module, key, num_steps):
    """Makes a diffusers scheduler draw the noise that `sample` draws, step by step."""
    noise = iter(np.stack([image_noise(key, image, num_steps) for image in range(B)], axis=1))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: channels_first(next(noise)))


@pytest.mark.parametrize(
    "spacing, num_steps, steps_offset",
    [(s, n, 0) for s in ("leading", "trailing", "linspace") for n in (1, 7, 20, 50, 999, 1000)]
    + [("leading", 20, 1), ("leading", 30, 1), ("leading", 999, 0)],
)
def test_timesteps_are_those_of_diffusers(spacing, num_steps, steps_offset):
    config = {"timestep_spacing": spacing, "steps_offset": steps_offset}
    reference = diffusers.DDIMScheduler(**config)
    reference.set_timesteps(num_steps)
    timesteps = ddim_timesteps(NoiseSchedule.from_config(config), num_steps)
    assert timesteps.dtype == np.int32
    np.testing.assert_array_equal(timesteps, reference.timesteps.numpy())


@pytest.mark.parametrize("num_steps", [61, 103, 998])
def test_trailing_timesteps_never_go_below_zero(num_steps):
    """Counts where diffusers' range, by rounding, has one value too many: a timestep of -1."""
    timesteps = ddim_timesteps(NoiseSchedule.from_config({"timestep_spacing": "trailing"}), num_steps)
    assert len(timesteps) == num_steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()


PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = {
    "leading-offset": (OFFSET, 20),
    "trailing": ({**STABLE, "timestep_spacing": "trailing"}, 10),
    "linspace": ({**STABLE, "timestep_spacing": "linspace"}, 7),
    "clipped": ({"clip_sample": True, "clip_sample_range": 1.5}, 10),
}
DDIM = {
    f"{name}-{prediction}": ({**config, "prediction_type": prediction}, num_steps, None)
    for name, (config, num_steps) in SPACINGS.items()
    for prediction in PREDICTIONS
}
# Stable Diffusion 1 ships a PNDM config: read by either library's DDIM it gives one image.
DDIM["pndm"] = ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None, **OFFSET}, 10, None)
NOISY = {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}
DDIM |= {f"noise-{eta}": (NOISY, 10, eta) for eta in (0.5, 1.0)}


@pytest.mark.parametrize(("config", "num_steps", "eta"), DDIM.values(), ids=DDIM)
def test_ddim_is_diffusers(inputs, monkeypatch, config, num_steps, eta):
    arguments = {}
    if eta is not None:
        arguments = {"eta": eta, "key": purpose_key(3, "sample")}
        inject_noise(monkeypatch, diffusers.schedulers.scheduling_ddim, arguments["key"], num_steps)
    schedule = NoiseSchedule.from_config(config)
    assert_same_images(diffusers.DDIMScheduler.from_config(config), schedule, inputs, num_steps, **arguments)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_float32_ddim_is_diffusers(inputs, prediction_type):
    config = {**OFFSET, "prediction_type": prediction_type}
    expected = diffusers_loop(diffusers.DDIMScheduler(**config), inputs, 20, 3.0)
    latents = sample(predict, schedule=NoiseSchedule.from_config(config), num_steps=20, guidance_scale=3.0, **inputs)
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_zero_terminal_snr_starts_from_pure_noise_as_in_diffusers(inputs, num_steps):
    config = {**STABLE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config["prediction_type"] = "v_prediction"
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alphas_cumprod[-1] == 0 and ddim_timesteps(schedule, num_steps)[0] == 999
    expected = diffusers_loop(diffusers.DDIMScheduler(**config), inputs, num_steps, 3.0)
    actual = sample(predict, schedule=schedule, num_steps=num_steps, guidance_scale=3.0, **inputs)
    # The rescaled levels agree to 5e-7 only.
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    settings = {"sampler": "ddpm", "key": purpose_key(0, "sample")}
    assert np.isfinite(
        sample(predict, schedule=schedule, num_steps=num_steps, guidance_scale=3.0, **settings, **inputs)
    ).all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", [OFFSET, {"clip_sample": True}], ids=["offset", "clipped"])
def test_ddpm_is_diffusers(inputs, monkeypatch, config, prediction_type):
    config = {**config, "prediction_type": prediction_type}
    key = purpose_key(4, "sample")
    inject_noise(monkeypatch, diffusers.schedulers.scheduling_ddpm, key, 20)
    scheduler = diffusers.DDPMScheduler(**{k: v for k, v in config.items() if k != "set_alpha_to_one"})
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **config})
    assert_same_images(scheduler, schedule, inputs, 20, sampler="ddpm", key=key)


def test_guidance_of_one_is_the_conditional_model_alone(inputs):
    settings = {"schedule": NoiseSchedule.from_config(OFFSET), "num_steps": 5}
    plain = sample(predict, guidance_scale=1.0, **settings, **{**inputs, "negative_text": None})
    guided = sample(predict, guidance_scale=jnp.float32(1.0), **settings, **inputs)
    np.testing.assert_allclose(plain, guided, atol=1e-5)


def test_an_image_does_not_depend_on_the_batch_and_keys_matter(inputs):
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **STABLE})
    settings = {"schedule": schedule, "num_steps": 6, "guidance_scale": 2.0, "sampler": "ddpm"}
    full = sample(predict, key=purpose_key(0, "sample"), **settings, **inputs)
    first = {**inputs, "text": inputs["text"][:1], "initial_latents": inputs["initial_latents"][:1]}
    np.testing.assert_allclose(sample(predict, key=purpose_key(0, "sample"), **settings, **first), full[:1], atol=1e-5)
    other = sample(predict, key=purpose_key(1, "sample"), **settings, **inputs)
    assert np.abs(other - full).max() > 0.1

    same = {k: np.broadcast_to(v[:1], v.shape) if k in ("text", "initial_latents") else v for k, v in inputs.items()}
    alike = sample(predict, key=purpose_key(0, "sample"), **settings, **same)
    assert np.abs(alike[0] - alike[1]).max() > 0.1


def test_negative_text_may_be_batched_and_sampling_nests_in_jit(inputs):
    schedule = NoiseSchedule.from_config(OFFSET)

    @jax.jit
    def run(schedule, inputs, guidance_scale):
        return sample(predict, schedule=schedule, num_steps=5, guidance_scale=guidance_scale, **inputs)

    expected = sample(predict, schedule=schedule, num_steps=5, guidance_scale=2.0, **inputs)
    batched = {**inputs, "negative_text": np.broadcast_to(inputs["negative_text"], (B, L, D))}
    np.testing.assert_allclose(run(schedule, batched, 2.0), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes, config, named",
    [
        ({"sampler": "euler"}, {}, "sampler.*'euler'.*ddim, ddpm"),
        ({"num_steps": 0}, {}, "num_steps is 0"),
        ({"num_steps": 1001}, {}, "num_steps is 1001"),
        ({"num_steps": 1000}, {"steps_offset": 1}, "steps_offset"),
        ({"negative_text": None}, {}, "negative_text is None.*guidance_scale is 2.0"),
        ({"eta": 2.0}, {}, "eta is 2.0"),
        ({"eta": 0.5}, {}, "key is None"),
        ({"sampler": "ddpm"}, {}, "key is None"),
        ({"sampler": "ddpm", "eta": 0.5}, {}, "eta is 0.5.*'ddpm'"),
        ({"sampler": "ddpm"}, {"variance_type": "learned"}, "variance_type is 'learned'"),
        ({}, {"thresholding": True}, "thresholding"),
        ({}, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"initial_latents": np.zeros((H, W, C))}, {}, r"initial_latents .*\(4, 5, 4\)"),
        ({"text": np.zeros((1, L, D))}, {}, r"text .*\(1, 2, 6\)"),
        ({"negative_text": np.zeros((L, 1))}, {}, r"negative_text .*\(2, 1\)"),
    ],
)
def test_bad_arguments(inputs, changes, config, named):
    arguments = {**inputs, "num_steps": 5, "guidance_scale": 2.0, **changes}
    with pytest.raises(ValueError, match=named):
        sample(predict, schedule=NoiseSchedule.from_config(config), **arguments)
