"""Training losses against what they are the mean of, by models whose error is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.diffusion.training import DiffusionBatch, denoising_batch_loss, diffusion_loss

SCHEDULE = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000})
# One timestep, so that nothing but the flips and captions is random.
STILL = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 1, "beta_start": 0.5})


def noise_of(schedule, noisy, timestep):
    """The noise in noisy latents whose clean ones are zero."""
    return noisy / jnp.sqrt(1 - schedule.alphas_cumprod[timestep])


def test_every_batch_takes_one_timestep_of_each_stratum():
    def predict(params, noisy, timestep, text):
        return noise_of(SCHEDULE, noisy, timestep) + timestep / 1000

    size, keys = 64, jax.random.split(jax.random.key(0), (30, 3))
    run = functools.partial(denoising_batch_loss, predict, SCHEDULE, {})
    losses = jax.vmap(lambda k: run(jnp.zeros((size, 4, 4, 2)), jnp.zeros((size, 3, 2)), *k))(keys)
    # The mean of (t / T)^2, of whose terms each is known to 1 / 64 of T: independent ones would scatter by 0.037.
    np.testing.assert_allclose(losses, np.square(np.arange(1000) / 1000).mean(), atol=4 * 0.3 / 64**1.5 * 2)
    assert np.std(losses) > 1e-5


def mean_loss(latents, input_ids, num_captions, caption_dropout, predict):
    """The mean over many keys; a batch's text states are its tokens."""

    def encode_text(params, input_ids):
        return input_ids[..., None].astype(jnp.float32)

    batch = DiffusionBatch(*map(jnp.asarray, (latents, input_ids, num_captions)))
    empty_ids = jnp.full(input_ids.shape[-1], 4)

    def loss(key):
        params = {"unet": {}, "text_encoder": {}}
        return diffusion_loss(predict, encode_text, STILL, params, batch, key, empty_ids, caption_dropout)[0]

    losses = jax.vmap(loss)(jax.random.split(jax.random.key(1), 200))
    return float(losses.mean()), float(losses.std() / np.sqrt(len(losses)))


def test_captions_are_drawn_evenly_and_dropped_as_often_as_asked():
    def predict(params, noisy, timestep, text):
        return noise_of(STILL, noisy, timestep) + text[0, 0]

    # Half of the images have one caption, of tokens 1, the others a second one, of tokens 2; 100 is padding.
    input_ids = np.tile(np.array([[[1, 1], [100, 100]], [[1, 1], [2, 2]]]), (32, 1, 1))
    num_captions = np.tile([1, 2], 32)
    latents = np.zeros((64, 2, 4, 4, 2), np.float32)
    for dropout in (0.0, 0.25):
        mean, error = mean_loss(latents, input_ids, num_captions, dropout, predict)
        kept = (1 + (1 + 4) / 2) / 2
        assert abs(mean - (dropout * 16 + (1 - dropout) * kept)) < 5 * error


def test_half_of_the_images_are_mirrored():
    def predict(params, noisy, timestep, text):
        return noise_of(STILL, noisy, timestep)

    latents = np.ones((64, 2, 4, 4, 2), np.float32) * np.array([1, 3], np.float32)[:, None, None, None]
    mean, error = mean_loss(latents, np.ones((64, 1, 2), int), np.ones(64, int), 0.0, predict)
    alpha = float(STILL.alphas_cumprod[0])
    # What the model takes for noise is off by the clean latents times sqrt(abar / (1 - abar)).
    assert abs(mean - alpha / (1 - alpha) * (1 + 9) / 2) < 5 * error
