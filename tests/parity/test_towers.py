"""Feature towers against transformers on random weights: CLIP's two halves, DINO's ViT, DINOv2 with registers."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from attrib_jax.attribution.features import pixel_features, text_features
from attrib_jax.convert.tower import load_tower
from attrib_jax.methods.features import default_tower
from tests.towers import CLIP, DINO, DINOV2, save_torch_tower

TOLERANCE = 1e-4


def pixels(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, side, side, 3)).astype(np.float32)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual), expected.detach().numpy()
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def torch_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def image_features(tower, images):
    with jax.default_matmul_precision("highest"):
        return tower.module.apply({"params": tower.params}, images, method="image_features")


TEXTS = ["a red heart", "hat", ""]
# Configs with eos_token_id 2, as the published CLIP's, do not tell the end token's real id: it is the largest.
OLD_IDS = np.array([[5, 9, 30, 599, 7, 7, 7, 7], [5, 590, 2, 40, 41, 42, 2, 1]], np.int32)


@pytest.mark.parametrize(
    ("activation", "text_config", "ids"),
    [("quick_gelu", {}, None), ("gelu", {}, None), ("quick_gelu", {"eos_token_id": 2}, OLD_IDS)],
    ids=["quick_gelu", "gelu", "old"],
)
def test_clip_matches_transformers(tmp_path, activation, text_config, ids):
    model = save_torch_tower("clip", tmp_path, hidden_act=activation, text_config=text_config)
    tower = load_tower(tmp_path)
    images = pixels(CLIP["vision_config"]["image_size"])
    if ids is None:
        ids = tower.tokenizer(TEXTS, padding="max_length", return_tensors="np")["input_ids"].astype(np.int32)
    with torch.no_grad():
        expected = model.get_image_features(torch_pixels(images)).pooler_output
        expected_text = model.get_text_features(torch.from_numpy(ids).long()).pooler_output
    assert relative_error(image_features(tower, images), expected) < TOLERANCE
    actual = tower.module.apply({"params": tower.params}, ids, method="text_features")
    assert relative_error(actual, expected_text) < TOLERANCE


@pytest.mark.parametrize("half", ["Vision", "Text"])
def test_one_half_with_its_projection(tmp_path, half):
    save_torch_tower("clip", tmp_path / "whole")
    config = transformers.CLIPConfig.from_pretrained(tmp_path / "whole")
    config = getattr(config, f"{half.lower()}_config")
    config.projection_dim = CLIP["projection_dim"]
    model = getattr(transformers, f"CLIP{half}ModelWithProjection").from_pretrained(tmp_path / "whole", config=config)
    save_torch_tower("clip", tmp_path / "half")  # for its tokenizer and image processor
    model.save_pretrained(tmp_path / "half")
    whole, tower = load_tower(tmp_path / "whole"), load_tower(tmp_path / "half", "clip")
    if half == "Vision":
        images = pixels(CLIP["vision_config"]["image_size"])
        np.testing.assert_array_equal(image_features(tower, images), image_features(whole, images))
        assert tower.tokenizer is None
    else:
        ids = np.array([[599, 3, 598, 598]], np.int32)
        features = [t.module.apply({"params": t.params}, ids, method="text_features") for t in (tower, whole)]
        np.testing.assert_array_equal(*features)
        assert tower.processor is None


@pytest.mark.parametrize("bias", [True, False])
def test_dino_matches_transformers(tmp_path, bias):
    model = save_torch_tower("dino", tmp_path, qkv_bias=bias)
    images = pixels(DINO["image_size"])
    with torch.no_grad():
        expected = model(torch_pixels(images)).last_hidden_state
    tower = load_tower(tmp_path)
    actual = tower.module.apply({"params": tower.params}, images)
    assert relative_error(actual, expected) < TOLERANCE
    np.testing.assert_array_equal(image_features(tower, images), actual[:, 0])


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("side", [DINOV2["image_size"], 24, 56])
def test_dinov2_matches_transformers(tmp_path, side, swiglu):
    """At its own size, and with position embeddings resized to fewer and to more patches."""
    model = save_torch_tower("dinov2", tmp_path, use_swiglu_ffn=swiglu)
    images = pixels(side)
    with torch.no_grad():
        expected = model(torch_pixels(images))
    tower = load_tower(tmp_path)
    actual = tower.module.apply({"params": tower.params}, images)
    assert relative_error(actual, expected.last_hidden_state) < TOLERANCE
    assert relative_error(image_features(tower, images), expected.pooler_output) < TOLERANCE


def test_the_shipped_tower_is_the_same_in_transformers():
    """Its own images and texts, from the image processor and tokenizer of its folder on."""
    folder = default_tower("clip", "openmoji")
    tower = load_tower(folder, "clip")
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    prepared = processor(picture[0], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(["woman astronaut"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = [model.get_image_features(prepared).pooler_output, model.get_text_features(tokens).pooler_output]
    actual = [pixel_features(tower, picture), text_features(tower, ["woman astronaut"])]
    assert all(relative_error(*pair) < TOLERANCE for pair in zip(actual, expected))
    assert sum(file.stat().st_size for file in Path(folder).iterdir()) < 6e6


@pytest.mark.parametrize("form", ["bin", "shards", "classifier"])
def test_weights_in_every_form_that_is_published(tmp_path, form):
    model = save_torch_tower("dino", tmp_path)
    images = pixels(DINO["image_size"])
    expected = image_features(load_tower(tmp_path), images)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    else:
        below = {f"vit.{name}": tensor for name, tensor in state.items()}
        torch.save(below | {"classifier.weight": torch.zeros(2, 24)}, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(image_features(load_tower(tmp_path), images), expected)
