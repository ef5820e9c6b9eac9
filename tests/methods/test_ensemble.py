"""Ensembles: standardised sums of what the methods give alone, their stored parts, and what is refused."""

import dataclasses

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.scores import standardised_sum
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import METHODS, check_method, method_config, queries_per_pass
from attrib_jax.storage.score_files import read_scores, write_result
from attrib_jax.storage.stage_root import StageRoot

SETTINGS = {"flips": "mean", "stride": 300, "latent_width": 0.7}


def ensemble(*names, weights=(), **settings):
    return method_config("ensemble", ensemble_methods=names, ensemble_weights=weights, **settings)


@pytest.fixture
def run(pipeline, dataset, tmp_path):
    return Run(pipeline, dataset, StageRoot(tmp_path))


@pytest.fixture(scope="module")
def queries(dataset):
    return [Query("hat", image=dataset[3].image), Query("flag", image=dataset[8].image)]


def test_standardised_sum_in_any_order_of_rows_over_the_common_ones():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=50), 1e6 * rng.normal(size=60) + 1e9
    order = rng.permutation(60)
    parts = [
        Scores(np.arange(50) + 10, first),
        Scores(np.arange(60)[order], second[order]),
        Scores(np.arange(70), np.full(70, 3.0)),
    ]
    found, constant = standardised_sum(parts, [2, -0.5, 1])
    common = [first, second[10:]]
    expected = sum(w * (s - s.mean()) / s.std() for w, s in zip((2, -0.5), common))
    np.testing.assert_array_equal(found.row_id, np.arange(50) + 10)
    np.testing.assert_allclose(found.score, expected, atol=1e-9)
    assert constant == [2]
    with pytest.raises(ValueError, match="row id"):
        standardised_sum([parts[0], Scores(np.arange(3), first[:3])], [1, 1])
    with pytest.raises(ValueError, match="weights"):
        standardised_sum(parts, [1, 1])


def test_it_is_the_standardised_sum_of_what_each_method_gives_alone(run, queries):
    names, weights = ("pixel", "random", "latent-gaussian"), (1.0, 0.5, 2.0)
    own = {"pixel": ("flips",), "random": (), "latent-gaussian": ("flips", "latent_width")}
    alone = {
        name: attribute_queries(run, queries, method_config(name, **{key: SETTINGS[key] for key in own[name]}))
        for name in names
    }
    config = ensemble(*names, weights=weights, flips="mean", latent_width=0.7)
    for place, result in enumerate(attribute_queries(run, queries, config)):
        parts = [alone[name][place].scores for name in names]
        np.testing.assert_array_equal(result.scores.score, standardised_sum(parts, weights)[0].score)
        for name, part in zip(names, parts):
            kept = read_scores(result.folder / "parts" / name)
            np.testing.assert_array_equal(kept.score, part.score)
    # One query alone, and equal weights, which need not be given.
    plain = attribute_queries(run, queries[1:], ensemble("random", "pixel"))[0]
    given = attribute_queries(run, queries[1:], ensemble("random", "pixel", weights=(1, 1)))[0]
    np.testing.assert_array_equal(plain.scores.score, given.scores.score)


def test_stored_parts_are_used_by_a_run_that_goes_on(run, queries, monkeypatch):
    config = ensemble("random", "pixel")

    def failing(run, queries, config):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "pixel", METHODS["pixel"]._replace(score=failing))
        with pytest.raises(OSError, match="the disk is gone"):
            attribute_queries(run, queries, config, ["a", "b"])
    file = run.root.workdir / "attribution" / "a" / "parts" / "random" / "scores.npz"
    changed = np.linspace(0, 1, len(run.dataset))
    write_result(file, Scores(run.dataset.row_ids, changed), ())
    result = attribute_queries(run, queries, config, ["a", "b"])[0]
    pixel = read_scores(result.folder / "parts" / "pixel")
    expected = standardised_sum([Scores(run.dataset.row_ids, changed), pixel], (1, 1))[0]
    np.testing.assert_array_equal(result.scores.score, expected.score)


def test_settings_go_to_the_methods_that_read_them_and_decide_the_result():
    config = ensemble("unlearn", "residual", step_size=0.1, stride=50, text_kernel=("same",), batch_size=8)
    unlearn, residual = config.parts
    assert (unlearn.step_size, unlearn.stride, residual.stride, residual.text_kernel) == (0.1, 50, 50, ("same",))
    assert config.describe()["parts"] == [unlearn.describe(), residual.describe()]
    assert (
        config.describe() == ensemble("unlearn", "residual", step_size=0.1, stride=50, text_kernel=("same",)).describe()
    )


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("ensemble_methods", "[]")),
        ({"ensemble_methods": ("pixel",)}, ("ensemble_methods", "pixel")),
        ({"ensemble_methods": ("pixel", "pixel")}, ("ensemble_methods", "pixel")),
        ({"ensemble_methods": "pixel"}, ("ensemble_methods", "pixel")),
        ({"ensemble_methods": ("pixel", "unlern")}, ("ensemble_methods", "unlern", "'unlearn'")),
        ({"ensemble_methods": ("pixel", "ensemble")}, ("ensemble_methods", "ensemble")),
        ({"ensemble_methods": ("pixel", "random"), "ensemble_weights": (1.0,)}, ("ensemble_weights", "[1.0]", "2")),
        ({"ensemble_methods": ("pixel", "random"), "ensemble_weights": (1.0, np.nan)}, ("ensemble_weights", "nan")),
        ({"ensemble_methods": ("pixel", "random"), "step_size": 0.1}, ("step_size", "0.1", "'unlearn'")),
        ({"ensemble_methods": ("pixel", "unlearn"), "cascade": 0.5}, ("cascade", "0.5", "unlearn")),
        ({"ensemble_methods": ("pixel", "clip")}, ("tower", "None")),
    ],
    ids=str,
)
def test_refusals_name_the_setting_and_its_value(settings, names):
    with pytest.raises(ValueError) as error:
        method_config("ensemble", **settings)
    assert all(name in str(error.value) for name in names), error.value


def test_demands_of_the_methods_are_checked_before_any_work(run, queries):
    for settings, names, message in (
        ({"stride": 2000}, ("random", "unlearn"), "stride is 2000"),
        ({"residual_start": 950}, ("random", "residual"), "residual_start is 950"),
    ):
        config = ensemble(*names, **settings)
        with pytest.raises(ValueError, match=message):
            check_method(run, config)
    region = ensemble("random", "unlearn", region=(0, 0, 99, 99))
    with pytest.raises(ValueError, match="region"):
        attribute_queries(run, queries, region)
    assert not (run.root.workdir / "attribution").exists()
    both = ensemble("random", "unlearn", queries_per_pass=3)
    assert queries_per_pass(run, both) == 3
    with pytest.raises(ValueError, match="parts"):
        dataclasses.replace(both, parts=())
