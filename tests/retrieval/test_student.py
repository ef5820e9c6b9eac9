"""The student: its losses, what it learns, and that a training that is stopped ends with the same bits."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score

from attrib_jax.retrieval import student
from attrib_jax.retrieval.features import pool_latents
from attrib_jax.retrieval.student import Lesson, StudentConfig

CONFIG = StudentConfig(
    student_dim=6, student_width=16, student_epochs=22, student_batch=4, student_top=4, student_dropout=0.0,
    student_learning_rate=0.01,
)  # fmt: skip


def make_lesson(queries=24, images=50, width=6, seed=0):
    """A teacher that looks at half of the features alone."""
    rng = np.random.default_rng(seed)
    asked, stored = rng.standard_normal((queries, width)), rng.standard_normal((images, width))
    seen = slice(0, width // 2)
    scores = (asked[:, seen] @ stored[:, seen].T).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, stored)]
    return Lesson(*(x.astype(np.float32) for x in unit), scores, np.arange(queries) >= queries - 8)


def test_mean_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    found, teacher = rng.standard_normal((3, 40)), rng.standard_normal((3, 40))
    expected = [
        average_precision_score(np.argsort(np.argsort(-own)) < 7, scores) for scores, own in zip(found, teacher)
    ]
    np.testing.assert_allclose(student.mean_average_precision(found, teacher, 7), expected)


@pytest.mark.parametrize("kind", student.LOSSES)
def test_losses_are_those_of_their_definition(kind):
    rng = np.random.default_rng(1)
    logits, rank = rng.standard_normal((2, 9)), np.stack([rng.permutation(9) for _ in range(2)])
    mask = np.append(np.ones(8), 0.0)
    found = student.student_loss(logits, rank, mask, kind, 3, 9)
    if kind == "softmax":
        target = np.maximum(0, 1 - rank / 3)[:, :8]
        target /= target.sum(1, keepdims=True)
        shares = np.exp(logits[:, :8]) / np.exp(logits[:, :8]).sum(1, keepdims=True)
        expected = -(target * np.log(shares)).sum(1).mean()
    else:
        target = (1 - rank / 9 if kind == "rank" else rank < 3)[:, :8]
        expected = np.mean(optax.sigmoid_binary_cross_entropy(logits[:, :8], target))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", student.LOSSES)
def test_a_student_learns_what_the_features_alone_do_not_tell(kind, tmp_path):
    lesson, config = make_lesson(), dataclasses.replace(CONFIG, student_loss=kind)
    params, log = student.train_student(tmp_path, lesson, config)
    plain = student.mean_average_precision(lesson.queries @ lesson.images.T, lesson.scores, 4)[lesson.held_out].mean()
    assert log[-1]["held_out_map_4"] > plain + 0.1 and log[-1]["loss"] < log[0]["loss"]
    loaded, stored, width = student.load_student(student.stored_student(tmp_path))
    assert stored == config and width == 6
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_an_untrained_student_is_the_cosine_of_the_features():
    lesson = make_lesson()
    params = student.init_student(CONFIG, 6)
    found = (
        student.embed_queries(params, CONFIG, lesson.queries) @ student.embed_images(params, CONFIG, lesson.images).T
    )
    np.testing.assert_allclose(found, lesson.queries @ lesson.images.T, atol=1e-5)


def test_a_stopped_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, _ = student.train_student(tmp_path / "whole", make_lesson(), CONFIG)
    precision, calls = student.mean_average_precision, iter(range(15))

    def stops(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return precision(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(student, "mean_average_precision", stops)
        student.train_student(tmp_path / "stopped", make_lesson(), CONFIG)
    resumed, log = student.train_student(tmp_path / "stopped", make_lesson(), CONFIG)
    assert [line["epoch"] for line in log] == list(range(1, 23))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_candidates_of_a_large_data_set_hold_the_first_images_of_every_query(monkeypatch):
    monkeypatch.setattr(student, "_CANDIDATES", 40)
    rng = np.random.default_rng(0)
    rank = np.stack([rng.permutation(100) for _ in range(3)])
    ids, mask = student._candidates(rng, rank, 4)
    assert ids.shape == mask.shape == (40,) and len(np.unique(ids[mask > 0])) == mask.sum()
    assert {*np.flatnonzero((rank < 4).any(0))} <= {*ids[mask > 0]}


def test_pooled_latents_are_means_over_cells():
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    expected = latents.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(pool_latents(latents), expected)
    assert pool_latents(latents[:, :2, :3]).shape == (2, 48)
