"""Training: resumed runs end with the same bits, and a whole tiny pipeline trains and is saved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.readers import TrainingImages, image_side
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.diffusion.training import autoencoder_loss, random_flips
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from attrib_jax.storage.stages import StageMismatchError
from attrib_jax.training.loop import FitConfig, fit
from attrib_jax.training.pipeline import TrainConfig, train
from tests.failures import UnreadableImages
from tests.tiny_dataset import make_dataset

SOURCE = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
CONFIG = FitConfig(steps=12, batch_size=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=4)


def _loss(params, batch, key):
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    loss = jnp.mean(jnp.square(noisy - params["centre"]))
    return loss, {"distance": jnp.sum(jnp.square(params["centre"]))}


def _fit(path, config=CONFIG):
    path.mkdir(exist_ok=True)
    return fit(path, _loss, {"centre": jnp.full((3,), 5.0)}, SOURCE, config, "test")


def test_fit_lowers_the_loss_and_logs_it(tmp_path):
    result = _fit(tmp_path / "run", FitConfig(steps=200, batch_size=8, learning_rate=0.2, warmup_steps=5, log_every=1))
    np.testing.assert_allclose(result["centre"], SOURCE.mean(axis=0), atol=0.1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 200 and lines[-1]["loss"] < lines[0]["loss"]


def test_flips_mirror_whole_images():
    images = jnp.arange(64 * 2 * 3 * 1, dtype=jnp.float32).reshape(64, 2, 3, 1)
    flipped = random_flips(jax.random.key(0), images)
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all() and 16 < mirrored.sum() < 48


def test_autoencoder_loss_is_the_sum_of_its_terms():
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    params = vae.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    # The same from the left as from the right, so that mirroring changes nothing.
    images = np.concatenate([images, images[:, :, ::-1]], axis=2)
    loss, terms = autoencoder_loss(vae, params, images, jax.random.key(1), mse_weight=2.0, kl_weight=0.5)
    scaled = images / np.float32(127.5) - 1
    mean, logvar = vae.apply({"params": params}, scaled, method=vae.encode)
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[1], mean.shape)
    errors = vae.apply({"params": params}, mean + np.exp(logvar / 2) * noise, method=vae.decode) - scaled
    # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2
    expected = {
        "l1": np.abs(errors).mean(),
        "mse": np.square(errors).mean(),
        "kl": (np.square(mean) + np.exp(logvar) - 1 - logvar).mean() / 2,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, expected["l1"] + 2 * expected["mse"] + expected["kl"] / 2, rtol=1e-4)


def test_a_pipeline_trains_is_saved_and_resumes_finished(tmp_path, caplog):
    config = TrainConfig(
        vae_steps=2,
        vae_batch_size=8,
        vae_learning_rate=1e-3,
        latent_channels=5,
        steps=2,
        batch_size=8,
        vae_channels=(8,),
        vae_groups=4,
        unet_channels=(16,),
        unet_heads=2,
        unet_groups=4,
        text_width=16,
        text_layers=1,
        text_heads=2,
        vocab_size=560,
        max_tokens=8,
    )
    unreadable = {0, 5}
    dataset = UnreadableImages(make_dataset(), unreadable, lambda row: UnreadableRowError(f"{row}.png is cut off"))
    path = train(tmp_path, dataset, config)
    assert {f"left out: {row}.png is cut off" for row in unreadable} <= set(caplog.messages)
    pipeline = load_pipeline(str(path))
    assert pipeline.tokenizer.model_max_length == 8
    assert not pipeline.schedule.clip_sample
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.in_channels == 5
    kept = [row for row in range(37) if row not in unreadable]
    images = np.stack([dataset[row].image for row in kept]) / np.float32(127.5) - 1
    encode = jax.jit(lambda params, images: pipeline.vae.apply({"params": params}, images, method="encode").mean)
    latents = encode(pipeline.params["vae"], images)
    assert abs(latents.std() * pipeline.vae.config.scaling_factor - 1) < 0.05
    again = load_pipeline(str(train(tmp_path, dataset, config)))
    jax.tree.map(np.testing.assert_array_equal, pipeline.params, again.params)
    # How often a run is stored does not decide its result.
    train(tmp_path, dataset, dataclasses.replace(config, checkpoint_every=1))
    for change in ({"vae_channels": (8, 16)}, {"latent_channels": 4}, {"steps": 3}, {"caption_dropout": 0.5}):
        with pytest.raises(StageMismatchError, match=next(iter(change))):
            train(tmp_path, dataset, dataclasses.replace(config, **change))


def test_the_next_image_stands_in_for_one_that_cannot_be_read(caplog):
    dataset = make_dataset()
    rows = np.array([4, 8, 9, 36])
    broken = UnreadableImages(dataset, {8, 9, 36}, lambda row: UnreadableRowError(f"{row}.png is cut off"))
    pictures = TrainingImages(broken, 16, rows)
    assert len(pictures) == 4 and image_side(broken) == 16
    for place in (*range(4), 1):
        found, image = pictures(place)
        assert found == 0
        np.testing.assert_array_equal(image, dataset[4].image)
    assert sorted(caplog.messages) == sorted(f"left out: {row}.png is cut off" for row in (8, 9, 36))
    with pytest.raises(ValueError, match="no image of dataset"):
        TrainingImages(broken, 16, rows[1:])(2)


@pytest.mark.parametrize(("width", "named"), [(20, "18 x 20 pixels"), (18, "18 pixels")])
def test_images_of_a_size_that_does_not_fit(tmp_path, width, named):
    dataset = ArrayDataset(np.zeros((3, 18, width, 3), np.uint8), [["hat"]] * 3)
    with pytest.raises(ValueError, match=named):
        train(tmp_path, dataset, TrainConfig(steps=1, vae_steps=1))
    assert not list(tmp_path.rglob("stage.json"))
    if width == 20:
        with pytest.raises(ValueError, match="18 x 20 pixels at position 1"):
            TrainingImages(dataset, 18)(1)


@pytest.mark.parametrize(
    ("config", "values", "named"),
    [
        (FitConfig, {"steps": 0}, "steps is 0"),
        (FitConfig, {"steps": 10, "warmup_steps": 10}, "warmup_steps is 10"),
        (FitConfig, {"learning_rate": 0.0}, "learning_rate is 0"),
        (FitConfig, {"ema_decay": 1.5}, "ema_decay is 1.5"),
        (TrainConfig, {"vae_batch_size": 0}, "vae_batch_size is 0"),
        (TrainConfig, {"caption_dropout": -0.1}, "caption_dropout is -0.1"),
        (TrainConfig, {"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_values_out_of_range_are_named(config, values, named):
    with pytest.raises(ValueError, match=named):
        config(**values)
