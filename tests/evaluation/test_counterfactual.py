"""Leave-K-out and LDS on a tiny model: what is measured, kept and refused."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.evaluation.counterfactual import Counterfactuals, MeasureConfig, training_key
from attrib_jax.evaluation.lds import LdsConfig, run_lds
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, random_positions, run_leave_k_out, top_positions
from attrib_jax.evaluation.metrics import half_subsets
from attrib_jax.evaluation.named import QuerySet, method_scores, read_methods
from attrib_jax.evaluation.retrain import Retrainer, Training
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.methods import method_config
from tests.evaluation.conftest import COUNT, RECIPE

QUERIES = tuple(Query(f"digit {word}", seed=3, guidance_scale=1.5, sampler_steps=4) for word in ("one", "two", "three"))
SET = QuerySet(QUERIES, num_tuning=1)
MEASURE = MeasureConfig(stride=250)
METHODS = {
    "random": method_config(method="random", flips="none"),
    "unlearn": method_config(flips="none", stride=500, query_draws=8, fisher_samples=16, damping=1e-6),
}


@pytest.fixture
def counterfactuals(attributor):
    return make(attributor)


def make(attributor, **changes):
    prepared = [prepare_query(attributor.pipeline, attributor.predict, query) for query in QUERIES]
    return Counterfactuals(attributor, QUERIES, prepared, **{"recipe": RECIPE, "measure": MEASURE} | changes)


def test_losses_are_those_of_the_retrained_weights(attributor, counterfactuals):
    training = Training(np.array([1, 8]))
    results = counterfactuals.results([training])
    (params,) = [
        jax.tree.map(lambda leaf: leaf[0], trained)
        for trained in [Retrainer(attributor.pipeline, attributor.data, RECIPE).train([training])]
    ]
    timesteps = strided_timesteps(250)
    for place, query in enumerate(QUERIES):
        prepared = prepare_query(attributor.pipeline, attributor.predict, query)
        noise = example_noise(loss_key(0), place, 0, 0, timesteps, prepared.latents.shape)
        expected = denoising_loss(
            attributor.predict,
            params,
            attributor.pipeline.schedule,
            prepared.latents,
            prepared.text,
            noise,
            timesteps,
        )
        assert results["loss"][0, place] == pytest.approx(float(expected), rel=1e-5)
        # The retrained model draws the same query from the same noise, and differs from it.
        pipeline = dataclasses.replace(attributor.pipeline, params=attributor.pipeline.params | {"unet": params})
        again = prepare_query(pipeline, attributor.predict, query).latents
        mse = np.mean(np.square(again - prepared.latents))
        assert mse > 0 and results["mse"][0, place] == pytest.approx(mse, rel=1e-3)


def test_models_are_trained_once(attributor, counterfactuals, monkeypatch):
    trainings = [Training(np.array([row])) for row in range(5)]
    first = counterfactuals.results(trainings)
    again = make(attributor)
    monkeypatch.setattr(again._retrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    second = again.results(trainings[::-1])
    np.testing.assert_array_equal(first["loss"], second["loss"][::-1])


def test_idle_devices_train_what_comes_later(attributor, monkeypatch):
    counterfactuals = make(attributor)
    retrainer, train, groups = counterfactuals._retrainer, counterfactuals._retrainer.train, []
    monkeypatch.setattr(
        retrainer, "train", lambda trainings, *args, **keys: groups.append(trainings) or train(trainings, *args, **keys)
    )
    size = retrainer.models_at_once
    trainings = [Training(np.array([row])) for row in range(size + 4)]
    now, ahead = trainings[: size + 1], trainings[:1] + trainings[size + 1 :]
    assert len(counterfactuals.results(now, ahead=ahead)["loss"]) == size + 1
    # Those asked for, then of the others as many as have a device.
    taken = size + min(size, 4)
    assert [int(each.removed[0]) for group in groups for each in group] == list(range(taken))
    counterfactuals.results(now, ahead=trainings)
    assert len(groups) == 2


def test_a_stopped_study_keeps_the_models_that_it_has(attributor, monkeypatch):
    counterfactuals = make(attributor)
    retrainer, train, calls = counterfactuals._retrainer, counterfactuals._retrainer.train, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(retrainer, "train", stop_at_second)
    trainings = [Training(np.array([row])) for row in range(retrainer.models_at_once + 1)]
    with pytest.raises(KeyboardInterrupt):
        counterfactuals.results(trainings)
    whole = make(attributor).results(trainings)["loss"]
    # Only the second group was left, and gives the loss that it would have had.
    assert len(calls) == 2
    np.testing.assert_array_equal(whole[-1:], make(attributor).results(trainings[-1:])["loss"])


def test_other_recipes_and_measures_have_results_of_their_own(attributor, counterfactuals):
    others = [
        make(attributor, recipe=dataclasses.replace(RECIPE, steps=7)),
        make(attributor, measure=MeasureConfig(500)),
    ]
    assert len({each.name for each in (counterfactuals, *others)}) == 3


def test_keys_ignore_the_order_of_what_is_removed():
    assert training_key(Training(np.array([3, 1]))) == training_key(Training(np.array([1, 3])))
    keys = [
        Training(np.array([1, 3])),
        Training(np.array([1, 3]), 1),
        Training(np.array([1])),
        Training(np.array([13])),
    ]
    assert len(set(map(training_key, keys))) == 4


def test_leave_k_out_removes_the_top_pictures_of_each_query(attributor, counterfactuals, monkeypatch):
    asked = []
    results = counterfactuals.results
    monkeypatch.setattr(
        counterfactuals, "results", lambda trainings, *args: asked.append(trainings) or results(trainings, *args)
    )
    config = LeaveKOutConfig(counts=(2,), curve=(6,), random_sets=2)
    rows, text = run_leave_k_out(counterfactuals, METHODS, SET, "reported", config)
    assert [(row["method"], row["K"]) for row in rows] == [
        *(("no pictures", 0), ("random pictures", 2), ("random", 2), ("unlearn", 2))
    ]
    _, reference, _, unlearn = rows
    scores = method_scores(attributor, "unlearn", METHODS["unlearn"], SET.of("reported"))
    # The model that lacks nothing, then one for each reported query.
    expected = [np.argsort(-query, kind="stable")[:2] for query in scores]
    assert [sorted(training.removed) for training in asked[-1][1:]] == [sorted(rows) for rows in expected]
    full = results([Training(np.array([], np.int64))])["loss"][0]
    after = [results([Training(removed)])["loss"][0, place] for removed, place in zip(expected, (1, 2))]
    assert unlearn["dL"] == pytest.approx(np.mean(after - full[1:]))
    sets = [random_positions(COUNT, 2, number) for number in range(2)]
    random = results([Training(removed) for removed in sets])["loss"][:, 1:] - full[1:]
    assert reference["dL"] == pytest.approx(random.mean())
    # Of two queries under two sets: half a difference each, the sets' own error in both.
    by_query, by_set = np.ptp(random.mean(0)) / 2, np.ptp(random.mean(1)) / 2
    assert reference["dL error"] == pytest.approx(np.hypot(by_query, by_set))
    over = after - full[1:] - random.mean(0)
    assert unlearn["over random"] == pytest.approx(over.mean())
    assert unlearn["in errors"] == pytest.approx(over.mean() / np.hypot(np.ptp(over) / 2, by_set))
    folder = attributor.root.workdir / "evaluation" / "leave-k-out-reported"
    assert (folder / "leave_k_out.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "queries.csv") as file:
        assert [row["query"] for row in csv.DictReader(file)] == ["digit two", "digit three"] * 2
    assert "| unlearn | 2 |" in text


def test_leave_k_out_averages_over_training_seeds(counterfactuals):
    # Of a method whose scores do not matter here.
    methods = {"random": METHODS["random"]}
    each = [
        run_leave_k_out(counterfactuals, methods, SET, "tuning", LeaveKOutConfig((3,), random_sets=1, seeds=seeds))[0]
        for seeds in ((0,), (1,), (0, 1))
    ]
    changes = [rows[2]["dL"] for rows in each]
    assert changes[2] == pytest.approx(np.mean(changes[:2])) and changes[0] != changes[1]
    # Models trained on all: their losses are what changes are from, and they draw other pictures than the queries.
    whole = [rows[0] for rows in each]
    full = counterfactuals.results([Training(np.array([], np.int64), seed) for seed in (0, 1)])["mse"][:, 0]
    assert [row["dL"] for row in whole] == [0, 0, 0]
    assert [row["MSE"] for row in whole] == pytest.approx([*full, full.mean()])


def test_pictures_of_retrained_models(attributor, monkeypatch):
    counterfactuals = make(attributor, measure=MeasureConfig(stride=250, pictures=True))
    config = LeaveKOutConfig((2,), random_sets=1)
    run_leave_k_out(counterfactuals, {"random": METHODS["random"]}, SET, "reported", config)
    folder = attributor.root.workdir / "evaluation" / "leave-k-out-reported"
    assert (folder / "pictures.png").read_bytes().startswith(b"\x89PNG")
    results = counterfactuals.results([Training(np.array([], np.int64))])
    original = np.stack([query.latents for query in counterfactuals.prepared])
    np.testing.assert_allclose(
        results["mse"], np.mean(np.square(results["latents"] - original), axis=(2, 3, 4)), rtol=1e-4
    )
    # Who asks for no pictures is served by the same models.
    plain = make(attributor)
    monkeypatch.setattr(plain._retrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    found = plain.results([Training(np.array([], np.int64))])
    np.testing.assert_array_equal(found["loss"], results["loss"])


def test_top_positions_break_ties_by_row_id():
    np.testing.assert_array_equal(top_positions(np.array([1.0, 5.0, 1.0, 1.0]), np.array([9, 4, 2, 7]), 3), [1, 2, 3])


def test_random_sets_are_nested_and_those_of_lds():
    np.testing.assert_array_equal(np.sort(random_positions(21, 11, 3)), np.flatnonzero(~half_subsets(21, 4)[3]))
    assert set(random_positions(21, 5, 3)) < set(random_positions(21, 11, 3))
    assert set(random_positions(21, 5, 3)) != set(random_positions(21, 5, 2))


def test_lds_of_a_tiny_model(attributor, counterfactuals):
    results, text = run_lds(counterfactuals, METHODS, SET, "reported", LdsConfig(models=5))
    assert set(results) == set(METHODS) and results["unlearn"].per_query.shape == (2,)
    assert all(-1 <= result.low <= result.high <= 1 for result in results.values())
    folder = attributor.root.workdir / "evaluation" / "lds-reported"
    assert (folder / "lds.png").exists() and "| unlearn |" in text


def test_scores_are_kept_without_the_attributions(attributor, monkeypatch):
    scores = method_scores(attributor, "unlearn", METHODS["unlearn"], QUERIES)
    assert scores.shape == (3, COUNT) and scores.dtype == np.float32
    monkeypatch.setattr(attributor, "attribute_many", lambda *args: pytest.fail("attributed again"))
    np.testing.assert_array_equal(scores, method_scores(attributor, "unlearn", METHODS["unlearn"], QUERIES))


def test_a_model_that_diverged_is_not_kept(attributor, monkeypatch):
    counterfactuals = make(attributor)
    measured = counterfactuals._measured

    def diverged(params, count):
        results = {name: array.copy() for name, array in measured(params, count).items()}
        results["mse"][0, 1] = np.inf
        return results

    monkeypatch.setattr(counterfactuals, "_measured", diverged)
    with pytest.raises(ValueError, match="the model without 1 pictures, seed 4, gives mse that is NaN or infinite"):
        counterfactuals.results([Training(np.array([5]), 4)])
    monkeypatch.undo()
    assert np.isfinite(counterfactuals.results([Training(np.array([5]), 4)])["mse"]).all()


def test_a_wrong_stride_costs_no_training(attributor):
    with pytest.raises(ValueError, match="stride is 1001"):
        make(attributor, measure=MeasureConfig(1001))


def test_a_cascade_ranks_what_is_removed(counterfactuals):
    cascade = dataclasses.replace(METHODS["unlearn"], cascade=0.1, cascade_stride=500, cascade_min=3)
    with pytest.raises(ValueError, match="scores 3 pictures in full, fewer than the 4"):
        run_leave_k_out(counterfactuals, {"a": cascade}, SET, "reported", LeaveKOutConfig((4,)))
    with pytest.raises(ValueError, match="method 'a' has a cascade, and sums need"):
        run_lds(counterfactuals, {"a": cascade}, SET, "reported", LdsConfig(models=3))


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_subsets_that_are_none(share):
    with pytest.raises(ValueError, match=f"lds_share is {share}, {round(share * COUNT)} of 13 pictures"):
        LdsConfig(share=share).subsets(COUNT)


def test_numbers_and_seeds_that_come_twice():
    with pytest.raises(ValueError, match=r"counts is \(2, 2\); expected each once"):
        LeaveKOutConfig((2, 2))
    with pytest.raises(ValueError, match=r"seeds is \(1, 1\)"):
        LeaveKOutConfig((2,), seeds=(1, 1))


def test_too_many_pictures_to_remove(counterfactuals):
    with pytest.raises(ValueError, match=f"13 pictures are to be removed from a data set of {COUNT}"):
        run_leave_k_out(counterfactuals, METHODS, SET, "reported", LeaveKOutConfig((2, COUNT)))


def test_queries_have_to_be_generated_ones(attributor):
    query = Query("digit one", latents=np.zeros((2, 2, 16), np.float32))
    with pytest.raises(ValueError, match="given picture"):
        Counterfactuals(attributor, [query], [None], RECIPE)


def test_a_split_without_queries():
    with pytest.raises(ValueError, match="no tuning queries"):
        QuerySet(QUERIES, 0).split("tuning")
    np.testing.assert_array_equal(SET.split("reported"), [1, 2])


def test_methods_files(tmp_path):
    file = tmp_path / "methods.json"
    file.write_text(json.dumps({"shared": {"stride": 50}, "a": {"step_size": 0.5}, "b": {"method": "random"}}))
    methods = read_methods(file)
    assert methods["a"] == method_config(stride=50, step_size=0.5) and methods["b"].method == "random"
    assert list(read_methods(file, ["b"])) == ["b"]
    with pytest.raises(ValueError, match="unknown method 'c'"):
        read_methods(file, ["c"])
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "no object of objects"),
        ('{"shared": {}}', "names no method"),
        ('{"a": {"stepsize": 1}}', "field of method 'a' 'stepsize'"),
        ('{"a": {"steps": 0}}', "method 'a' of .* steps is 0"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_methods(file)
