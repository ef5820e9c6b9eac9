"""Counterfactual models: what is measured of them, and that each is trained once."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.evaluation.counterfactual import Counterfactuals, MeasureConfig, training_key
from attrib_jax.evaluation.retrain import Retrainer, Training
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.parallel.mesh import data_mesh
from tests.evaluation.conftest import QUERIES, RECIPE, files, make_counterfactuals


def without(*rows, seed=0):
    return Training(np.array(rows, np.int64), seed)


def test_losses_are_those_of_the_retrained_weights(run):
    training = without(1, 8)
    results = make_counterfactuals(run).results([training])
    params = jax.tree.map(lambda leaf: leaf[0], Retrainer(run.pipeline, run.data, RECIPE).train([training]))
    retrained = dataclasses.replace(run.pipeline, params=run.pipeline.params | {"unet": params})
    timesteps = strided_timesteps(250)
    for place, query in enumerate(QUERIES):
        prepared = prepare_query(run.pipeline, run.predict, query)
        noise = example_noise(loss_key(0), place, 0, 0, timesteps, prepared.latents.shape)
        inputs = run.pipeline.schedule, prepared.latents, prepared.text, noise, timesteps
        expected = denoising_loss(run.predict, params, *inputs)
        assert results["loss"][0, place] == pytest.approx(float(expected), rel=1e-5)
        # The retrained model draws the same query from the same noise, and differs from it.
        again = prepare_query(retrained, run.predict, query).latents
        mse = np.mean(np.square(again - prepared.latents))
        assert mse > 0 and results["mse"][0, place] == pytest.approx(mse, rel=1e-3)


def test_models_are_trained_once(run, tmp_path):
    trainings = [without(row) for row in range(5)]
    first, stored = make_counterfactuals(run).results(trainings), files(tmp_path)
    second = make_counterfactuals(run).results(trainings[::-1])
    np.testing.assert_array_equal(first["loss"], second["loss"][::-1])
    assert files(tmp_path) == stored


def test_idle_devices_train_what_comes_later(run, tmp_path):
    counterfactuals, size = make_counterfactuals(run), data_mesh().size
    trainings = [without(row) for row in range(size + 4)]
    counterfactuals.results(trainings[: size + 1], ahead=trainings[size + 1 :])
    # Two rounds of all devices: those asked for, then as many of the others as have a device.
    taken = size + min(size, 4)
    stored = files(tmp_path)
    counterfactuals.results(trainings[:taken])
    assert files(tmp_path) == stored
    if taken < len(trainings):
        counterfactuals.results(trainings)
        assert files(tmp_path) != stored


def test_a_study_that_ends_early_keeps_the_models_that_it_has(run, tmp_path):
    counterfactuals = make_counterfactuals(run)
    trainings = [without(row) for row in range(data_mesh().size)]
    with pytest.raises(ValueError, match="13"):
        counterfactuals.results([*trainings, without(*range(13))])
    stored = files(tmp_path)
    assert np.isfinite(make_counterfactuals(run).results(trainings)["loss"]).all()
    assert files(tmp_path) == stored


def test_other_recipes_and_measures_have_results_of_their_own(run):
    others = {"recipe": dataclasses.replace(RECIPE, steps=7)}, {"measure": MeasureConfig(500)}, {}
    assert len({make_counterfactuals(run, **changes).name for changes in others}) == 3


def test_who_asks_for_no_latents_is_served_by_models_that_have_them(run, tmp_path):
    counterfactuals = make_counterfactuals(run, measure=MeasureConfig(250, pictures=True))
    results, stored = counterfactuals.results([without()]), files(tmp_path)
    original = np.stack([query.latents for query in counterfactuals.prepared])
    mse = np.mean(np.square(results["latents"] - original), axis=(2, 3, 4))
    np.testing.assert_allclose(results["mse"], mse, rtol=1e-4)
    np.testing.assert_array_equal(make_counterfactuals(run).results([without()])["loss"], results["loss"])
    assert files(tmp_path) == stored


def test_keys_ignore_the_order_of_what_is_removed():
    assert training_key(without(3, 1)) == training_key(without(1, 3))
    assert len(set(map(training_key, [without(1, 3), without(1, 3, seed=1), without(1), without(13)]))) == 4


def test_a_model_that_diverged_is_not_kept(run):
    # The loss of the only step is taken before the weights move.
    recipe = dataclasses.replace(RECIPE, steps=1, warmup_steps=0, learning_rate=1e35)
    counterfactuals = make_counterfactuals(run, recipe=recipe)
    with pytest.raises(ValueError, match="without 1 .*seed 4.*learning_rate"):
        counterfactuals.results([without(5, seed=4)])
    assert not (run.root.workdir / counterfactuals.name / "models.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"latents": np.zeros((2, 2, 16), np.float32)}, "digit one"),
        ({"sampler": "ddpm"}, "ddpm"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({}, "stride is 1001"),
    ],
)
def test_wrong_queries_and_strides_cost_no_training(run, change, named):
    measure = MeasureConfig(250 if change else 1001)
    queries = [Query("digit two", guidance_scale=1.5), dataclasses.replace(QUERIES[0], sampler_steps=50, **change)]
    with pytest.raises(ValueError, match=named):
        Counterfactuals(run, queries, [None, None], RECIPE, measure)


@pytest.mark.parametrize(("setting", "value"), [("stride", 0), ("stride", 2.5), ("seed", -1), ("seed", 2**32)])
def test_measure_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        MeasureConfig(**{setting: value})


def test_kept_models_answer_new_queries_without_training(run, tmp_path, monkeypatch):
    measure, trainings = MeasureConfig(250, keep_models=True), [without(1), without(2, 3), without(5)]
    make_counterfactuals(run, measure=measure).results(trainings)
    others = [dataclasses.replace(QUERIES[0], seed=77)]
    prepared = [prepare_query(run.pipeline, run.predict, query) for query in others]

    def asked():
        return Counterfactuals(run, others, prepared, RECIPE, measure).results(trainings)

    with monkeypatch.context() as patch:
        patch.setattr(Retrainer, "train", None)
        kept = asked()
    # Trained again, where the files are gone, it says the same: what is measured is what is kept.
    for file in tmp_path.rglob("evaluation/*/*.safetensors"):
        file.unlink()
    again = asked()
    np.testing.assert_array_equal(kept["loss"], again["loss"])


def test_a_damaged_kept_model_is_trained_again(run, tmp_path):
    measure = MeasureConfig(250, keep_models=True)
    expected = make_counterfactuals(run, measure=measure).results([without(1)])
    for file in tmp_path.rglob("evaluation/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    np.testing.assert_array_equal(
        make_counterfactuals(run, measure=measure).results([without(1)])["mse"], expected["mse"]
    )
