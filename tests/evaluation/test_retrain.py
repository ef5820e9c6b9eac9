"""Retraining: what is drawn, that nothing else decides the weights, and that a stopped training goes on."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.evaluation.retrain import Recipe, Retrainer, Training, draw_batches
from attrib_jax.evaluation.small_models import train_small
from attrib_jax.jobs.context import Run
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from attrib_jax.storage.state import StateStore
from tests.evaluation.conftest import COUNT, RECIPE

NOTHING = np.array([], np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model, tiny_dataset):
    return Run(tiny_model, tiny_dataset, StageRoot(tmp_path_factory.mktemp("encoded"))).data


def test_an_epoch_draws_every_picture_once(data):
    recipe = Recipe(steps=COUNT, batch_size=3, warmup_steps=0)
    rows = draw_batches(data, Training(NOTHING), recipe, 0, COUNT).row.ravel()
    for epoch in np.split(rows, 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert (rows[:COUNT] != rows[COUNT : 2 * COUNT]).any()


def test_removed_pictures_alone_are_replaced(data):
    removed = np.array([2, 7, 11])
    full, less = (draw_batches(data, Training(rows), RECIPE, 0, 50) for rows in (NOTHING, removed))
    gone = np.isin(full.row, removed)
    assert not np.isin(less.row, removed).any()
    np.testing.assert_array_equal(less.row[~gone], full.row[~gone])
    # Stand-ins are spread over the pictures that are left.
    assert len(np.unique(less.row[gone])) >= 8


def test_draws_are_a_function_of_seed_and_step(data):
    whole = draw_batches(data, Training(NOTHING, 5), RECIPE, 0, 40)
    part = draw_batches(data, Training(NOTHING, 5), RECIPE, 17, 31)
    for array, piece in zip(whole, part):
        np.testing.assert_array_equal(array[17:31], piece)
    other = draw_batches(data, Training(NOTHING, 6), RECIPE, 0, 40)
    assert (other.row != whole.row).mean() > 0.5


def test_captions_belong_to_their_pictures_or_are_dropped(data):
    recipe = Recipe(steps=200, batch_size=4, caption_dropout=0.25)
    draws = draw_batches(data, Training(NOTHING), recipe, 0, 200)
    dropped = draws.caption < 0
    assert 0.2 < dropped.mean() < 0.3
    # One caption a picture here.
    np.testing.assert_array_equal(draws.caption[~dropped], draws.row[~dropped])
    assert not draws.flip.any()
    flipped = draw_batches(data, Training(NOTHING), Recipe(steps=200, batch_size=4, random_flips=True), 0, 200).flip
    assert 0.45 < flipped.mean() < 0.55


def test_a_model_is_the_same_to_the_bit_whatever_trains_beside_it(data, tiny_model):
    retrainer = Retrainer(tiny_model, data, RECIPE, mesh=data_mesh(jax.devices()[:2]))
    first, second = Training(np.array([3, 4])), Training(NOTHING, 1)
    together = retrainer.train([first, second])
    swapped = retrainer.train([second, first])
    alone = retrainer.train([first])
    for leaf, other, single in zip(*map(jax.tree.leaves, (together, swapped, alone))):
        np.testing.assert_array_equal(leaf[0], other[1])
        np.testing.assert_array_equal(leaf[0], single[0])
        assert np.isfinite(leaf).all()
    moved = jax.tree.map(lambda leaf: float(np.abs(leaf[0] - leaf[1]).max()), together)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_several_models_on_one_device_are_those_trained_alone(data, tiny_model, one_device):
    trainings = [Training(np.array([0])), Training(np.array([5, 6]))]
    together = Retrainer(tiny_model, data, RECIPE, per_device=2, mesh=one_device).train(trainings)
    single = Retrainer(tiny_model, data, RECIPE, mesh=one_device)
    for place, training in enumerate(trainings):
        alone = single.train([training])
        for leaf, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(leaf[place], other[0], atol=2e-5)


def test_a_stopped_training_goes_on_to_the_same_bits(data, tiny_model, one_device, tmp_path, monkeypatch):
    monkeypatch.setattr("attrib_jax.evaluation.retrain._STEPS_PER_DRAW", 2)
    retrainer, training = Retrainer(tiny_model, data, RECIPE, mesh=one_device), Training(np.array([1]))
    whole = retrainer.train([training])
    states = StateStore(tmp_path)
    steps, run = [], retrainer._step

    def stop_at_fifth(shared, batch):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return run(shared, batch)

    retrainer._step = stop_at_fifth
    with pytest.raises(KeyboardInterrupt):
        retrainer.train([training], states, seconds_between_states=0.0)
    assert states.path.exists()
    resumed = retrainer.train([training], states, seconds_between_states=0.0)
    # Four steps were done and stored, two were left.
    assert len(steps) == 5 + 2
    for leaf, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(leaf, other)
    # Another training does not go on from that state.
    another = retrainer.train([Training(np.array([2]))], states)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(another)))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (np.arange(COUNT), "at least one to be left"),
        (np.array([COUNT]), "outside the data set of 13"),
        (np.array([1, 1]), "one twice"),
    ],
)
def test_bad_removals(data, tiny_model, one_device, removed, message):
    with pytest.raises(ValueError, match=message):
        Retrainer(tiny_model, data, RECIPE, mesh=one_device).train([Training(removed)])


def test_bad_recipes():
    with pytest.raises(ValueError, match="steps is 0"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match="caption_dropout is 1.5"):
        Recipe(caption_dropout=1.5)


def test_a_small_model_is_trained_anew_for_another_schedule(tmp_path, tiny_model, tiny_dataset):
    untrained = dataclasses.replace(tiny_model, params=tiny_model.params | {"unet": {}})
    recipe = dataclasses.replace(RECIPE, steps=2)
    train_small(tmp_path, tiny_dataset, untrained, recipe)
    config = untrained.schedule.to_config() | {"prediction_type": "epsilon"}
    other = dataclasses.replace(untrained, schedule=NoiseSchedule.from_config(config))
    with pytest.raises(StageMismatchError, match="inputs.model"):
        train_small(tmp_path, tiny_dataset, other, recipe)
