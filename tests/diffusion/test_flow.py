"""Flow matching against diffusers' FlowMatchEulerDiscreteScheduler: noise levels, samples, losses, weights."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3

from attrib_jax.diffusion.flow import FlowSchedule, flow_sigmas, sample_flow
from attrib_jax.diffusion.losses import batch_losses, denoising_losses

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
CONFIGS = {
    "sd3": CLASS | {"shift": 3.0},
    "flux_dev": CLASS | {"shift": 3.0, "use_dynamic_shifting": True},
    "flux_schnell": CLASS | {"shift": 1.0},
    "linear": CLASS | {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0},
    "terminal": CLASS | {"shift": 2.0, "shift_terminal": 0.1},
}
TOKENS = 6  # of latents of 4 x 6


def theirs(name: str, steps: int):
    """diffusers' scheduler with its levels set as its pipelines set them."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS[name])
    config = scheduler.config
    ends = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    mu = calculate_shift(TOKENS, *ends) if config.use_dynamic_shifting else None
    if name.startswith("flux"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def ours(name: str) -> FlowSchedule:
    return FlowSchedule.from_config(CONFIGS[name]).replace(uniform_sigmas=name.startswith("flux"))


def predict(params, noisy, timestep, conditioning):
    return params * jnp.tanh(noisy) + jnp.cos(timestep / 300) * conditioning["text"][0, :2]


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("name", CONFIGS)
def test_levels_are_diffusers(name, steps):
    if name == "terminal" and steps == 1:
        return  # its only level is 1, which cannot be stretched
    np.testing.assert_allclose(flow_sigmas(ours(name), steps, TOKENS), theirs(name, steps).sigmas, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", ["sd3", "flux_dev"])
def test_samples_are_diffusers(name, guidance):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 4, 6, 2)).astype(np.float32)
    texts = {"text": rng.normal(size=(2, 1, 3)).astype(np.float32)}
    empty = {"text": rng.normal(size=(1, 3)).astype(np.float32)}
    found = sample_flow(predict, 0.7, ours(name), texts, empty, noise, 5, guidance)
    scheduler = theirs(name, 5)
    expected = torch.tensor(noise)
    for timestep in scheduler.timesteps:

        def output(texts, latents=expected, timestep=timestep):
            return 0.7 * np.tanh(latents) + np.cos(float(timestep) / 300) * texts

        conditional = output(torch.tensor(texts["text"])[:, None, :, :2])
        unconditional = output(torch.tensor(empty["text"])[None, None, :, :2])
        velocity = unconditional + guidance * (conditional - unconditional)
        expected = scheduler.step(velocity.float(), timestep, expected).prev_sample
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_levels_and_targets_are_those_of_training():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CLASS)
    schedule = FlowSchedule.from_config(CLASS)
    rng = np.random.default_rng(1)
    latents, noise = rng.normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
    timesteps = np.array([0, 499, 999])
    told = schedule.model_timesteps(timesteps)
    np.testing.assert_allclose(told, [1, 500, 1000], rtol=1e-6)
    expected = scheduler.scale_noise(torch.tensor(latents), torch.tensor([1.0, 500, 1000]), torch.tensor(noise))
    np.testing.assert_allclose(schedule.add_noise(latents, noise, timesteps), expected, atol=1e-6)
    np.testing.assert_array_equal(schedule.target(latents, noise, timesteps), noise - latents)
    assert np.isnan(schedule.add_noise(latents[0], noise[0], 1000)).all()


@pytest.mark.parametrize("weighting", ["uniform", "logit_normal", "cosmap", "sigma_sqrt"])
def test_losses_are_weighted_errors_of_the_velocity(weighting):
    schedule = FlowSchedule.from_config(CLASS | {"loss_weighting": weighting})
    rng = np.random.default_rng(2)
    latents, noise = rng.normal(size=(4, 6, 2)), rng.normal(size=(3, 4, 6, 2))
    text, timesteps = {"text": rng.normal(size=(1, 3))}, np.array([9, 499, 999])
    sigmas = (timesteps + 1) / 1000
    if weighting == "logit_normal":
        logits = torch.distributions.TransformedDistribution(
            torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0),
            [torch.distributions.SigmoidTransform()],
        )
        weights = np.append(logits.log_prob(torch.tensor(sigmas[:2])).exp().numpy(), 0)
    else:
        weights = compute_loss_weighting_for_sd3(weighting, torch.tensor(sigmas)).numpy()
    with jax.enable_x64():
        losses = denoising_losses(predict, 0.7, schedule, latents, text, noise, timesteps)
        each = jax.tree.map(lambda leaf: np.stack([leaf] * 3), (latents, text))
        batched = batch_losses(predict, 0.7, schedule, *each, noise, timesteps)
    expected = []
    for sigma, draw, weight in zip(sigmas, noise, weights, strict=True):
        noisy = (1 - sigma) * latents + sigma * draw
        error = np.asarray(predict(0.7, noisy, 1000 * sigma, text)) - (draw - latents)
        expected.append(weight * np.mean(error**2))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(batched, expected, rtol=1e-6)


def test_its_config_comes_back():
    config = CONFIGS["flux_dev"] | {"_diffusers_version": "0.1"}
    assert FlowSchedule.from_config(config).to_config() == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ({"stochastic_sampling": True}, "stochastic_sampling is True"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic'"),
        ({"loss_weighting": "none"}, "loss_weighting is 'none'"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"base_image_seq_len": 4096}, "base_image_seq_len and max_image_seq_len are both 4096"),
    ],
)
def test_unsupported_configs_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        FlowSchedule.from_config(CLASS | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"negative": None}, "negative is None.*guidance_scale is 2.0"),
        ({"initial_latents": np.zeros((4, 6, 2))}, r"initial_latents has shape \(4, 6, 2\)"),
        ({"conditioning": {"text": np.zeros((3, 1, 3))}}, "conditioning has leading axes.*3.*expected 2"),
    ],
)
def test_bad_arguments_of_the_sampler_are_named(change, named):
    texts = {"text": np.zeros((2, 1, 3), np.float32)}
    arguments = {
        "conditioning": texts,
        "negative": texts,
        "initial_latents": np.zeros((2, 4, 6, 2), np.float32),
        "num_steps": 2,
        "guidance_scale": 2.0,
    }
    with pytest.raises(ValueError, match=named):
        sample_flow(predict, 0.7, ours("sd3"), **arguments | change)
