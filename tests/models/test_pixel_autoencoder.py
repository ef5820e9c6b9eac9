"""The autoencoder without weights, and pipelines that hold it."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.digits import DigitsDataset
from attrib_jax.data.sources import open_dataset
from attrib_jax.evaluation.small_models import SmallUNet, pixel_pipeline
from attrib_jax.jobs.context import model_fingerprint
from attrib_jax.models.vae import PixelAutoencoder, PixelAutoencoderConfig
from tests.models.random_params import random_params


@pytest.mark.parametrize(("patch", "grey"), [(1, True), (2, True), (4, False)])
def test_pixels_come_back_as_they_were(patch, grey):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    if grey:
        images = np.repeat(images[..., :1], 3, axis=-1)
    vae = PixelAutoencoder(PixelAutoencoderConfig(8, patch, grey))
    latents = vae.apply({"params": {}}, images, method=vae.encode).mean
    assert latents.shape == (3, 8 // patch, 8 // patch, vae.config.latent_channels)
    np.testing.assert_allclose(vae.apply({"params": {}}, latents, method=vae.decode), images, atol=1e-6)
    # One latent pixel holds its own square of pixels.
    inside = np.asarray(latents)[:, 0, 0].reshape(3, patch, patch, -1)
    np.testing.assert_allclose(inside[..., 0], images[:, :patch, :patch, 0], atol=1e-6)


def test_a_pipeline_on_pixels_saves_and_loads(tmp_path):
    digits = open_dataset("digits")
    pipeline = pixel_pipeline(digits, SmallUNet((8,), heads=2, groups=4))
    unet = random_params(pipeline.unet, 2, (5, pipeline.unet.config.cross_attention_dim))
    pipeline = dataclasses.replace(pipeline, params=pipeline.params | {"unet": unet})
    save_pipeline(pipeline, str(tmp_path / "model"))
    loaded = load_pipeline(str(tmp_path / "model"))
    assert model_fingerprint(loaded) == model_fingerprint(pipeline)
    assert loaded.vae.config == PixelAutoencoderConfig(8, 4)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, pipeline.params)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    # No class of diffusers: the folder does not claim one.
    assert index["vae"] == ["attrib_jax", "PixelAutoencoder"]


def test_digits_are_scikit_learns():
    digits = open_dataset("digits")
    assert isinstance(digits, DigitsDataset) and len(digits) == 1797
    assert [digits.captions(row)[0] for row in range(3)] == ["digit zero", "digit one", "digit two"]
    row = digits[3]
    assert row.image.shape == (8, 8, 3) and row.image.dtype == np.uint8
    scan = load_digits().images[3]  # 0 to 16
    np.testing.assert_array_equal(row.image, np.round(scan * 255 / 16)[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: PixelAutoencoderConfig(8, 3), "patch, 3"),
        (lambda: PixelAutoencoderConfig.from_dict({"colour": True}), "'colour'"),
        (lambda: open_dataset("digits", resolution=16), "8 pixels"),
        (lambda: open_dataset("digits:train"), "digits"),
    ],
)
def test_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"\[studies\]"):
        open_dataset("digits")
