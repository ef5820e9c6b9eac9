"""The noise schedule against diffusers' own arrays, and its configuration rules."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# The scheduler of Stable Diffusion 1.4, as shipped.
SD14 = SCALED_LINEAR | {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
        SD14,
        {**SCALED_LINEAR, "num_train_timesteps": 37},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        {"trained_betas": [0.1, 0.2, 0.5], "num_train_timesteps": 3},
        {"num_train_timesteps": 1},
    ],
)
def test_alphas_cumprod_is_diffusers_to_the_bit(config):
    schedule = NoiseSchedule.from_config(config)
    arguments = {key: value for key, value in config.items() if key not in ("_class_name", "skip_prk_steps")}
    reference = diffusers.DDIMScheduler(**arguments).alphas_cumprod.numpy()
    assert schedule.alphas_cumprod.dtype == jnp.float32
    np.testing.assert_array_equal(schedule.alphas_cumprod, reference)


@pytest.mark.parametrize("cls", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(cls):
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **SCALED_LINEAR}
    schedule = NoiseSchedule.from_config({"_class_name": cls, **config})
    reference = getattr(diffusers, cls)(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, reference, rtol=2e-6, atol=1e-9)
    assert schedule.alphas_cumprod[-1] == (0 if cls == "DDIMScheduler" else 2**-24)


@pytest.mark.parametrize(
    "name",
    "DDIM DDPM PNDM LCM TCD HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete EulerDiscrete EulerAncestralDiscrete "
    "LMSDiscrete DEISMultistep DPMSolverMultistep DPMSolverSinglestep UniPCMultistep".split(),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_absent_keys_take_the_defaults_of_the_class(name):
    schedule = NoiseSchedule.from_config({"_class_name": f"{name}Scheduler"})
    reference = getattr(diffusers, f"{name}Scheduler")()
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=1e-6)
    for field in ("set_alpha_to_one", "steps_offset", "timestep_spacing", "clip_sample", "prediction_type"):
        if field in reference.config:
            assert getattr(schedule, field) == reference.config[field], field


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_add_noise_and_target_are_diffusers(prediction_type):
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 5, 4, 4, 3))
    timesteps = np.array([0, 1, 500, 998, 999], np.int32)
    config = {**SD14, "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config)
    reference = diffusers.DDPMScheduler.from_config(config)
    arguments = [torch.from_numpy(x) for x in (latents, noise, timesteps.astype(np.int64))]
    expected = reference.add_noise(*arguments).numpy()
    expected_target = noise if prediction_type == "epsilon" else reference.get_velocity(*arguments).numpy()

    with jax.enable_x64(True):
        noisy = schedule.add_noise(jnp.asarray(latents), jnp.asarray(noise), timesteps)
        assert noisy.dtype == jnp.float64
        np.testing.assert_allclose(noisy, expected, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(schedule.target(latents, noise, timesteps), expected_target, rtol=1e-14, atol=1e-14)

    single, atol = (np.float32(latents), np.float32(noise)), 1e-6
    assert schedule.add_noise(*single, timesteps).dtype == jnp.float32
    np.testing.assert_allclose(schedule.add_noise(*single, timesteps), expected, atol=atol)
    np.testing.assert_allclose(schedule.add_noise(single[0][2], single[1][2], 500), expected[2], atol=atol)
    one_latent = np.broadcast_to(latents[0], latents.shape).copy()
    expected_one = reference.add_noise(torch.from_numpy(one_latent), *arguments[1:]).numpy()
    np.testing.assert_allclose(schedule.add_noise(single[0][0], single[1], timesteps), expected_one, atol=atol)

    # Half precision keeps the noise of the first timesteps.
    half = jnp.zeros((2, 4, 4, 3), jnp.bfloat16)
    noisy = schedule.add_noise(half, half + 1, np.array([0, 1]))
    assert noisy.dtype == jnp.bfloat16
    of_noise = np.sqrt(1 - np.asarray(schedule.alphas_cumprod[:2], np.float64))
    np.testing.assert_allclose(np.asarray(noisy, np.float64)[:, 0, 0, 0], of_noise, rtol=2**-8)


def test_a_timestep_out_of_range_is_nan_and_shapes_are_checked():
    schedule = NoiseSchedule.from_config(SD14)
    x = np.ones((2, 4, 4, 3), np.float32)
    for outside in (1000, -1):
        noisy = schedule.add_noise(x, x, np.array([999, outside]))
        assert np.isfinite(noisy[0]).all() and np.isnan(noisy[1]).all()
    with pytest.raises(ValueError, match=r"noise has shape \(2, 4, 4, 3\).*\(3,\)"):
        schedule.add_noise(x, x, np.zeros(3, np.int32))


def test_config_round_trip_and_pytree():
    schedule = NoiseSchedule.from_config(SD14)
    assert schedule.to_config() == SD14
    assert not schedule.clip_sample and not schedule.set_alpha_to_one and schedule.steps_offset == 1
    leaves, treedef = jax.tree.flatten(schedule)
    assert len(leaves) == 1 and leaves[0].shape == (1000,)
    assert treedef == jax.tree.structure(NoiseSchedule.from_config(dict(SD14)))
    noisy = jax.jit(lambda s, x: s.add_noise(x, x, 0))(schedule, jnp.ones((2, 2, 1)))
    assert noisy.shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'.*epsilon, v_prediction"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEuler.*beta_start"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas .*\(2,\)"),
        ({"beta_end": 1.5}, r"betas .* 1.5.*\[0, 1\]"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_unsupported_configs_are_errors(config, named):
    with pytest.raises(ValueError, match=named):
        NoiseSchedule.from_config(config)


def test_strided_timesteps():
    fifty = strided_timesteps(50)
    assert fifty.dtype == np.int32 and len(fifty) == 20 and fifty[-1] == 950
    np.testing.assert_array_equal(strided_timesteps(300), [0, 300, 600, 900])
    np.testing.assert_array_equal(strided_timesteps(1, 3), [0, 1, 2])
    np.testing.assert_array_equal(strided_timesteps(1000), [0])


@pytest.mark.parametrize("stride", [0, -50, 1001, 2.5, True])
def test_bad_stride(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}"):
        strided_timesteps(stride)
