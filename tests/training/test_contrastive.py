"""The contrastive loss and the retrieval ranks against numbers worked by hand, and a tower that learns its pictures."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.feature_head import FeatureHead, LinearMap
from attrib_jax.attribution.features import cosine_similarities
from attrib_jax.convert.tokenizer import train_tokenizer
from attrib_jax.convert.tower import load_tower
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.storage.stages import StageMismatchError
from attrib_jax.training.contrastive import contrastive_loss, normalise, random_shifts, retrieval_ranks
from attrib_jax.training.tower import TowerConfig, holdout_rows, retrieval, train_tower
from tests.failures import UnreadableImages


def test_a_loss_by_hand_where_two_images_share_a_caption():
    logits = np.log([[3.0, 1.0, 4.0], [2.0, 2.0, 4.0], [1.0, 1.0, 2.0]])
    positives = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    rows = [np.log([3 / 8, 1 / 8]).mean(), np.log([1 / 4, 1 / 4]).mean(), np.log(1 / 2)]
    columns = [np.log([3 / 6, 2 / 6]).mean(), np.log([1 / 4, 2 / 4]).mean(), np.log(2 / 10)]
    expected = -(np.mean(rows) + np.mean(columns)) / 2
    assert contrastive_loss(jnp.asarray(logits), jnp.asarray(positives)) == pytest.approx(expected, rel=1e-6)


def test_shifts_move_by_whole_pixels_and_repeat_the_edge():
    images = np.arange(2 * 5 * 5, dtype=np.uint8).reshape(2, 5, 5, 1)
    shifted = np.asarray(random_shifts(jax.random.key(3), images, 2))
    for image, result in zip(images, shifted):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "edge")
        candidates = [padded[i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
        assert any(np.array_equal(result, candidate) for candidate in candidates)
    assert not np.array_equal(shifted, images)
    np.testing.assert_array_equal(random_shifts(jax.random.key(3), images, 0), images)


def test_ranks_by_hand():
    similarity = np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.2], [0.4, 0.6, 0.6]])
    right = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 1]], bool)
    # Two answers; a tie that counts against the second query; the best of two right ones.
    np.testing.assert_array_equal(retrieval_ranks(similarity, right), [2, 2, 1])


def test_similarities_by_hand():
    features = np.array([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 0.0], [-1.0, 0.0]]])
    (values,) = cosine_similarities(features, np.array([[0.0, 5.0]]))
    np.testing.assert_allclose(values, [[0.8, 1.0], [0.0, 0.0]])
    mapping = LinearMap(np.array([[1.0, 0.0], [0.0, -1.0]]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(normalise(jnp.asarray(features[:, 0])), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    # Mapped: (3, -3), (0, -1), (0, 1), (-1, 1) and the query (0, -4).
    (values,) = cosine_similarities(features, np.array([[0.0, 5.0]]), FeatureHead(mapping, mapping))
    np.testing.assert_allclose(values, [[0.5**0.5, 1.0], [-1.0, -(0.5**0.5)]])
    # The query by a mapping of its own: (5, 0).
    swap = LinearMap(np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(2))
    (values,) = cosine_similarities(features, np.array([[0.0, 5.0]]), FeatureHead(mapping, swap))
    np.testing.assert_allclose(values, [[0.5**0.5, 0.0], [0.0, -(0.5**0.5)]])


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}


def coloured_dataset() -> ArrayDataset:
    """Squares of five colours, eight of each: pictures of one colour share their caption."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 21, (40, 8, 8, 3))
    images = np.clip(np.array([*COLOURS.values()] * 8)[:, None, None] + noise, 0, 255).astype(np.uint8)
    return ArrayDataset(images, [[name] for name in COLOURS] * 8)


# A batch that one device holds: the tests' four would exchange it at every step.
CONFIG = TowerConfig(
    steps=30,
    batch_size=7,
    learning_rate=3e-3,
    checkpoint_every=15,
    holdout=0.25,
    **dict(width=16, layers=1, heads=2, patch_size=4, text_width=16, text_layers=1, text_heads=2),
    projection_dim=8,
    largest_shift=1,
)


def test_a_tower_learns_resumes_and_is_refused_other_settings(tmp_path):
    dataset, tokenizer = coloured_dataset(), train_tokenizer(COLOURS, vocab_size=520, model_max_length=4)
    held_out = holdout_rows(dataset, 0.25, 0)
    # One of those to learn from and one of those to be tested on.
    lost = {int(held_out[3]), int(np.setdiff1d(np.arange(40), held_out)[5])}
    dataset = UnreadableImages(dataset, lost, lambda row: UnreadableRowError(f"picture {row} is cut off"))
    folder, results = train_tower(tmp_path / "whole", dataset, tokenizer, CONFIG)
    assert results["pictures"] == 9 and results["captions_of_all"] == 5
    assert results["recall@1"] >= 0.8  # 0.2 by chance
    assert json.loads((tmp_path / "whole" / "retrieval.json").read_text()) == results
    tower = load_tower(folder)
    assert retrieval(tower, dataset, held_out) == results
    trained = (folder / "model.safetensors").read_bytes()
    # The last checkpoint is lost, and the tower with it: the run goes on from the one before.
    shutil.rmtree(tmp_path / "whole" / "tower_training" / "30")
    shutil.rmtree(folder)
    again, _ = train_tower(tmp_path / "whole", dataset, tokenizer, CONFIG)
    assert (again / "model.safetensors").read_bytes() == trained
    with pytest.raises(StageMismatchError, match="settings.holdout: found 0.25, expected 0.0"):
        train_tower(tmp_path / "whole", dataset, tokenizer, dataclasses.replace(CONFIG, holdout=0.0))
    with pytest.raises(StageMismatchError, match="inputs.tokenizer"):
        other = train_tokenizer([text[::-1] for text in COLOURS], vocab_size=520, model_max_length=4)
        train_tower(tmp_path / "whole", dataset, other, CONFIG)


def test_whole_groups_are_held_out():
    groups = np.repeat(np.arange(10), 4)
    images = np.zeros((40, 4, 4, 3), np.uint8)
    rows = holdout_rows(ArrayDataset(images, [["a"]] * 40, groups=groups), 0.2, 0)
    assert len(rows) == 8 and len(np.unique(groups[rows])) == 2
    assert len(holdout_rows(ArrayDataset(images, [["a"]] * 40), 0.0, 0)) == 0
