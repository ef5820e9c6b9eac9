"""Retraining: what is drawn, that nothing else decides the weights, and that a stopped training goes on."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.evaluation.retrain import Recipe, Retrainer, Training, draw_batches
from attrib_jax.jobs.context import Run
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.stage_root import StageRoot
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


class StoppingStore(StateStore):
    """Stops the run once it holds a state."""

    def write(self, tree, progress):
        super().write(tree, progress)
        raise KeyboardInterrupt


class WatchedStore(StateStore):
    """Knows the state that a run goes on from."""

    def read(self, like):
        self.found = super().read(like)
        return self.found


def test_a_stopped_training_goes_on_to_the_same_bits(data, tiny_model, one_device, tmp_path):
    # Batches are drawn for 100 steps together; states are stored between them.
    recipe = dataclasses.replace(RECIPE, steps=103)
    retrainer, training = Retrainer(tiny_model, data, recipe, mesh=one_device), Training(np.array([1]))
    whole = retrainer.train([training])
    with pytest.raises(KeyboardInterrupt):
        retrainer.train([training], StoppingStore(tmp_path), seconds_between_states=0.0)
    states = WatchedStore(tmp_path)
    resumed = retrainer.train([training], states)
    assert states.found[1]["step"] == 100
    for leaf, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(leaf, other)
    # Another training does not go on from that state.
    another = retrainer.train([Training(np.array([2]))], states)
    alone = retrainer.train([Training(np.array([2]))])
    for leaf, other in zip(jax.tree.leaves(another), jax.tree.leaves(alone)):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize(
    "removed", [np.arange(COUNT), np.array([COUNT]), np.array([-1]), np.array([1, 1])], ids=["all", "13", "-1", "twice"]
)
def test_removals_that_cannot_be(data, tiny_model, one_device, removed):
    with pytest.raises(ValueError, match="removed"):
        Retrainer(tiny_model, data, RECIPE, mesh=one_device).train([Training(removed)])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("batch_size", 2.5),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("caption_dropout", 1.5),
        ("ema_decay", float("nan")),
        ("warmup_steps", 400),
    ],
)
def test_wrong_recipes_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        Recipe(**{setting: value})


def test_the_warm_up_takes_a_tenth_of_a_short_training():
    assert [Recipe(steps=steps).warmup_steps for steps in (30, 400, 5000)] == [3, 40, 50]
