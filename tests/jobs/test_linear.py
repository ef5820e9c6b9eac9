"""Linearised scores: gradients times the weight change, in forward mode for one query and in reverse for several."""

import jax
import numpy as np
import pytest

from attrib_jax.attribution.scores import example_loss
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.linear import linear_pass, weight_change
from attrib_jax.jobs.losses import base_losses, dataset_pass, loss_program, loss_weights
from attrib_jax.jobs.settings import LossSettings, PassSettings
from attrib_jax.storage.stage_root import StageRoot

WEIGHTS, TIMESTEPS = "cross-attn-kv", np.arange(0, 1000, 300, dtype=np.int32)


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("linear")))


@pytest.fixture(scope="module")
def changes(run):
    """Two changes of the selected weights."""
    selected, _ = run.select(WEIGHTS)
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 1e-4, selected) for _ in range(2)]


def linear(run, path, changes, **settings):
    paths = [path / str(place) for place in range(len(changes))]
    return linear_pass(run, paths, changes, WEIGHTS, LossSettings(stride=300, **settings), "linear")


@pytest.fixture(scope="module")
def first(run, changes, tmp_path_factory):
    return linear(run, tmp_path_factory.mktemp("first"), changes[:1])[0]


def test_scores_are_dense_gradients_times_the_weight_change(run, changes, first):
    """One gradient an example by `jax.grad`, dotted with the change in float64 by numpy."""
    selected, rest = run.select(WEIGHTS)
    change = {name: np.float64(leaf) for name, leaf in flatten_names(changes[0]).items()}

    @jax.jit
    def gradient(selected, rest, example):
        def loss(selected):
            params = merge_weights(selected, rest)
            return example_loss(run.predict, run.pipeline.schedule, params, loss_key(0), example, TIMESTEPS)

        return flatten_names(jax.grad(loss)(selected))

    for row in (0, 5, 36):
        for flip in range(2):
            (latents,), (text,) = run.data.inputs(row, flip, 0)
            ids = (np.int32(value) for value in (run.data.row_ids[row], flip, 0))
            dense = gradient(selected, rest, Batch(latents, text, *ids, np.float32(1)))
            expected = sum((np.float64(dense[name]) * change[name]).sum() for name in change)
            np.testing.assert_allclose(first[row, flip], expected, rtol=2e-4, atol=1e-6 * np.abs(first).max())


def test_scores_are_the_loss_change_of_a_small_step(run, changes, first, tmp_path):
    selected, _ = run.select(WEIGHTS)
    moved, config = jax.tree.map(np.add, selected, changes[0]), LossSettings(stride=300)
    program = loss_program(run, config)
    (after,) = dataset_pass(run, [tmp_path], program, loss_weights(run, program, [moved], WEIGHTS), "after")
    exact = after - base_losses(run, config)
    assert np.corrcoef(exact.ravel(), first.ravel())[0, 1] > 0.999
    np.testing.assert_allclose(exact, first, atol=0.05 * np.abs(first).max())
    # The change is taken from the weights as unlearning leaves them.
    again = flatten_names(weight_change(moved, selected))
    for name, leaf in flatten_names(changes[0]).items():
        np.testing.assert_allclose(again[name], leaf, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"captions": "all"}, {"flips": "none"}])
def test_scores_of_many_are_those_of_each(run, changes, first, tmp_path, settings):
    together = linear(run, tmp_path / "together", changes, **settings)
    assert together[0].shape == (37, 1 if "flips" in settings else 2)
    for place, change in enumerate(changes):
        (alone,) = linear(run, tmp_path / f"alone {place}", [change], **settings)
        np.testing.assert_allclose(together[place], alone, rtol=1e-3, atol=1e-5 * np.abs(alone).max())
    if "captions" not in settings:
        assert np.corrcoef(together[0].ravel(), first[:, : together[0].shape[1]].ravel())[0, 1] > 0.99999


def test_scores_in_another_precision(run, changes, first, tmp_path):
    (rounded,) = linear(run, tmp_path, changes[:1], precision="bfloat16")
    assert not np.array_equal(rounded, first)
    assert np.corrcoef(rounded.ravel(), first.ravel())[0, 1] > 0.95


def test_shared_noise_gives_the_derivative_of_the_losses_under_it(run, changes, first, tmp_path):
    config = PassSettings(stride=300, shared_noise=True)
    (found,) = linear_pass(run, [tmp_path], changes[:1], WEIGHTS, config, "linear")
    program, (selected, _) = loss_program(run, config), run.select(WEIGHTS)
    moved = [jax.tree.map(np.add, selected, changes[0]), jax.tree.map(np.subtract, selected, changes[0])]
    after, before = (program(weights, run.data, np.arange(8)) for weights in loss_weights(run, program, moved, WEIGHTS))
    np.testing.assert_allclose(found[:8], (after - before) / 2, rtol=0.05, atol=0.05 * np.abs(found).max())
    assert np.corrcoef(found.ravel(), first.ravel())[0, 1] < 0.999
