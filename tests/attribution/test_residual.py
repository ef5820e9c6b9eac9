"""The residual product on a tiny denoiser: its relation to the loss and to the tangent kernel, and its averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.residual import mean_over_captions, residual_products, residuals
from attrib_jax.core.keys import example_noise, loss_key, purpose_key, shared_noise
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

KEY, TIMESTEPS = purpose_key(3, "shared noise"), np.array([60, 80, 95], np.int32)
SHAPE = (tiny_denoiser.SIZE, tiny_denoiser.SIZE, tiny_denoiser.CHANNELS)


def make_batch(count: int) -> Batch:
    row_id, latents, text = tiny_denoiser.make_data(count)
    zeros = np.zeros(count, np.int32)
    return Batch(latents[:, 0], text[:, 0], row_id, zeros, zeros, np.ones(count, np.float32))


def test_shared_noise_is_standard_normal_and_a_function_of_key_and_timestep_alone():
    noise = np.asarray(shared_noise(KEY, np.arange(100), (16, 16, 4)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise.reshape(100, -1))[~np.eye(100, dtype=bool)]).max() < 0.2
    np.testing.assert_array_equal(shared_noise(KEY, np.array([70, 3]), (16, 16, 4)), noise[[70, 3]])
    other = shared_noise(purpose_key(4, "shared noise"), np.array([70]), (16, 16, 4))
    assert np.abs(other - noise[70]).max() > 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shared", [True, False])
def test_residuals_are_target_less_prediction_and_their_mean_square_is_the_loss(prediction_type, shared):
    schedule = NoiseSchedule.from_config({"num_train_timesteps": 100, "prediction_type": prediction_type})
    params, batch = tiny_denoiser.init_params(), make_batch(5)
    key = KEY if shared else loss_key(3)
    found = jax.jit(functools.partial(residuals, predict, shared=shared))(schedule, params, key, batch, TIMESTEPS)
    found = np.asarray(found, np.float64).reshape(5, 3, *SHAPE)
    levels = np.asarray(schedule.alphas_cumprod, np.float64)[TIMESTEPS]
    for i in range(5):
        noise = shared_noise(KEY, TIMESTEPS, SHAPE) if shared else example_noise(key, i, 0, 0, TIMESTEPS, SHAPE)
        losses = denoising_losses(predict, params, schedule, batch.latents[i], batch.text[i], noise, TIMESTEPS)
        np.testing.assert_allclose(np.square(found[i]).mean(axis=(1, 2, 3)), losses, rtol=1e-5)
        for s, (level, eps) in enumerate(zip(levels, np.asarray(noise, np.float64))):
            clean = np.asarray(batch.latents[i], np.float64)
            noisy = np.sqrt(level) * clean + np.sqrt(1 - level) * eps
            target = eps if prediction_type == "epsilon" else np.sqrt(level) * eps - np.sqrt(1 - level) * clean
            prediction = predict(params, noisy.astype(np.float32), TIMESTEPS[s], batch.text[i])
            expected = target - np.asarray(prediction, np.float64)
            np.testing.assert_allclose(found[i, s], expected, atol=2e-5)


def test_it_is_the_influence_where_the_tangent_kernel_is_the_identity():
    """For f = theta, a free output at each timestep, gradients are -2 r / n and F = I: influence is 4 <r, r'> / n^2."""
    params = {"output": jnp.asarray(np.random.default_rng(1).normal(size=(100, *SHAPE)), jnp.float32)}
    batch = make_batch(4)

    def free(params, noisy, timestep, text):
        return params["output"][timestep]

    def loss(params, i):
        noise = shared_noise(KEY, TIMESTEPS, SHAPE)
        return jnp.mean(denoising_losses(free, params, SCHEDULE, batch.latents[i], batch.text[i], noise, TIMESTEPS))

    gradients = np.stack([np.asarray(jax.grad(loss)(params, i)["output"], np.float64).ravel() for i in range(4)])
    found = np.asarray(residuals(free, SCHEDULE, params, KEY, batch, TIMESTEPS))
    products = residual_products(found[:, None], found)[:, :, 0]
    np.testing.assert_allclose(4 * products / found.shape[1] ** 2, gradients @ gradients.T, rtol=1e-4, atol=1e-9)


def test_products_read_blocks_of_half_precision_and_average_over_captions():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2500, 2, 7)).astype(np.float16)
    queries = rng.normal(size=(3, 7))
    products = residual_products(features, queries)
    np.testing.assert_allclose(products, np.einsum("mfk,qk->qmf", features.astype(np.float64), queries), atol=1e-12)
    image = np.sort(np.concatenate([np.arange(900), rng.integers(0, 900, 1600)]))
    means = mean_over_captions(products, image)
    for number in (0, 17, 899):
        np.testing.assert_allclose(means[:, number], products[:, image == number].mean(axis=1), atol=1e-12)
    np.testing.assert_array_equal(mean_over_captions(products[:, :4], np.arange(4)), products[:, :4])
