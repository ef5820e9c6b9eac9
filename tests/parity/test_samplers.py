"""The samplers against diffusers' own DDIM and DDPM loops, from the same initial noise and a small known model."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.core.keys import purpose_key
from attrib_jax.diffusion.samplers import ddim_timesteps, ddpm_step, sample
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


def assert_same_pictures(scheduler, schedule, inputs, num_steps, **step_arguments):
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config, num_steps",
    [
        (OFFSET, 20),
        ({**STABLE, "timestep_spacing": "trailing"}, 10),
        ({**STABLE, "timestep_spacing": "linspace"}, 7),
        ({"clip_sample": True, "clip_sample_range": 1.5}, 10),
    ],
    ids=["leading-offset", "trailing", "linspace", "clipped"],
)
def test_ddim_is_diffusers(inputs, config, num_steps, prediction_type):
    config = {**config, "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config)
    assert_same_pictures(diffusers.DDIMScheduler(**config), schedule, inputs, num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
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
    ancestral = sample(
        predict, schedule=schedule, num_steps=50, guidance_scale=3.0, sampler="ddpm", key=jax.random.key(0), **inputs
    )
    assert np.isfinite(ancestral).all()


def test_ddim_of_a_pndm_config_is_diffusers_ddim(inputs):
    """Stable Diffusion 1 ships a PNDM config: read by either library's DDIM it gives one picture."""
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None, **OFFSET}
    schedule = NoiseSchedule.from_config(config)
    assert_same_pictures(diffusers.DDIMScheduler.from_config(config), schedule, inputs, 10)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_is_diffusers(inputs, monkeypatch, eta):
    key = purpose_key(3, "sample")
    config = {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}
    inject_noise(monkeypatch, diffusers.schedulers.scheduling_ddim, key, 10)
    schedule = NoiseSchedule.from_config(config)
    assert_same_pictures(diffusers.DDIMScheduler(**config), schedule, inputs, 10, eta=eta, key=key)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", [OFFSET, {"clip_sample": True}], ids=["offset", "clipped"])
def test_ddpm_is_diffusers(inputs, monkeypatch, config, prediction_type):
    config = {**config, "prediction_type": prediction_type}
    key = purpose_key(4, "sample")
    inject_noise(monkeypatch, diffusers.schedulers.scheduling_ddpm, key, 20)
    scheduler = diffusers.DDPMScheduler(**{k: v for k, v in config.items() if k != "set_alpha_to_one"})
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **config})
    assert_same_pictures(scheduler, schedule, inputs, 20, sampler="ddpm", key=key)


@pytest.mark.parametrize("timestep", [0, 50, 950])
def test_ddpm_step_is_diffusers_step(inputs, monkeypatch, timestep):
    rng = np.random.default_rng(timestep)
    output, noise = rng.normal(size=(2, B, H, W, C)).astype(np.float32)
    scheduler = diffusers.DDPMScheduler(**STABLE)
    scheduler.set_timesteps(20)
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: channels_first(noise))
    latents = channels_first(inputs["initial_latents"])
    expected = scheduler.step(channels_first(output), timestep, latents).prev_sample

    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **STABLE})
    alpha = schedule.alphas_cumprod[timestep]
    previous = schedule.alphas_cumprod[timestep - 50] if timestep else jnp.float32(1)
    actual = ddpm_step(schedule, output, inputs["initial_latents"], alpha, previous, noise * (timestep > 0))
    np.testing.assert_allclose(actual, expected.movedim(1, -1).numpy(), rtol=1e-5, atol=1e-5)


def test_guidance_of_one_is_the_conditional_model_alone(inputs):
    schedule = NoiseSchedule.from_config(OFFSET)
    widths = []

    def watched(params, noisy, timestep, text):
        jax.debug.callback(lambda _: widths.append(1), noisy[0, 0, 0])
        return predict(params, noisy, timestep, text)

    arguments = {**inputs, "negative_text": None}
    plain = sample(watched, schedule=schedule, num_steps=5, guidance_scale=1.0, **arguments)
    jax.effects_barrier()
    assert len(widths) == 5 * B
    guided = sample(predict, schedule=schedule, num_steps=5, guidance_scale=jnp.float32(1.0), **inputs)
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


def test_negative_text_may_be_batched_and_sampling_nests_in_jit_and_float64(inputs):
    schedule = NoiseSchedule.from_config(OFFSET)
    expected = sample(predict, schedule=schedule, num_steps=5, guidance_scale=2.0, **inputs)
    batched = {**inputs, "negative_text": np.broadcast_to(inputs["negative_text"], (B, L, D))}
    np.testing.assert_array_equal(
        sample(predict, schedule=schedule, num_steps=5, guidance_scale=2.0, **batched), expected
    )
    nested = jax.jit(lambda s, i, g: sample(predict, schedule=s, num_steps=5, guidance_scale=g, **i))
    np.testing.assert_allclose(nested(schedule, inputs, 2.0), expected, atol=1e-5)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, inputs)
        latents = sample(predict, schedule=schedule, num_steps=5, guidance_scale=2.0, **wide)
        assert latents.dtype == jnp.float64
        np.testing.assert_allclose(latents, expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({"sampler": "euler"}, {}, "sampler is 'euler'; expected one of ddim, ddpm"),
        ({"num_steps": 0}, {}, "num_steps is 0; expected an integer from 1 to 1000"),
        ({"num_steps": 1001}, {}, "num_steps is 1001"),
        ({"num_steps": 1000}, {"steps_offset": 1}, "steps_offset 1 starts at timestep 1000 of 1000"),
        ({"negative_text": None}, {}, "negative_text is None, but guidance_scale is 2.0"),
        ({"eta": 2.0}, {}, "eta is 2.0"),
        ({"eta": 0.5}, {}, "key is None"),
        ({"sampler": "ddpm"}, {}, "key is None"),
        ({"sampler": "ddpm", "eta": 0.5}, {}, "eta is 0.5, but sampler is 'ddpm'"),
        ({"sampler": "ddpm"}, {"variance_type": "learned"}, "variance_type is 'learned'"),
        ({}, {"thresholding": True}, "thresholding"),
        ({}, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"initial_latents": np.zeros((H, W, C))}, {}, "initial_latents has shape"),
        ({"text": np.zeros((1, L, D))}, {}, r"text has shape \(1, 2, 6\); expected .* B = 3"),
        ({"negative_text": np.zeros((L, 1))}, {}, r"negative_text has shape \(2, 1\)"),
    ],
)
def test_bad_arguments(inputs, changes, config, message):
    arguments = {**inputs, "num_steps": 5, "guidance_scale": 2.0, **changes}
    with pytest.raises(ValueError, match=message):
        sample(predict, schedule=NoiseSchedule.from_config(config), **arguments)
