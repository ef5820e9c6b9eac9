"""The linear datamodeling score on a tiny model."""

import csv
import dataclasses

import numpy as np
import pytest

from attrib_jax.evaluation.lds import LdsConfig, run_lds
from attrib_jax.evaluation.metrics import lds, noise_ceiling
from attrib_jax.evaluation.named import method_scores
from tests.evaluation.conftest import COUNT, METHODS, SET, make_counterfactuals


def test_scores_of_each_method_are_correlated_with_the_losses(run):
    counterfactuals, config = make_counterfactuals(run), LdsConfig(lds_models=5, lds_share=0.7, lds_seed=2)
    results, text = run_lds(counterfactuals, METHODS, SET, config)
    kept, trainings = config.subsets(COUNT)
    assert kept.shape == (5, COUNT) and set(kept.sum(axis=1)) == {9}
    losses = counterfactuals.results(trainings)["loss"][:, 1:]
    for name, method in METHODS.items():
        expected = lds(method_scores(run, name, method, SET, "reported"), kept, losses)
        np.testing.assert_array_equal(results[name].per_query, expected.per_query)
    assert (run.root.workdir / "evaluation" / "lds-reported" / "lds.png").exists() and "| unlearn |" in text


def test_losses_are_averaged_over_training_seeds_and_methods_compared_with_the_default(run):
    counterfactuals = make_counterfactuals(run)
    methods = {"default": METHODS["unlearn"], "random": METHODS["random"]}
    config = LdsConfig(lds_models=5, train_seeds=(0, 1, 2))
    results, _ = run_lds(counterfactuals, methods, SET, config)
    kept, trainings = config.subsets(COUNT)
    losses = counterfactuals.results(trainings)["loss"][:, 1:].reshape(3, 5, 2)
    scores = method_scores(run, "default", methods["default"], SET, "reported")
    np.testing.assert_array_equal(results["default"].per_query, lds(scores, kept, losses.mean(axis=0)).per_query)
    with open(run.root.workdir / "lds.csv") as file:
        rows = {row.pop("method"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    difference = results["random"].less(results["default"])
    assert rows["random"]["lds"] == results["random"].mean and rows["random"]["difference"] == difference.mean
    assert rows["random"]["difference_error"] == difference.error and np.isnan(rows["default"]["difference"])
    assert rows["random"]["ceiling"] == rows["default"]["ceiling"] == noise_ceiling(losses)


def test_a_cascade_has_no_sums(run):
    cascade = dataclasses.replace(METHODS["unlearn"], cascade=0.1, cascade_stride=500)
    with pytest.raises(ValueError, match="cascade is 0.1 for method 'a'"):
        run_lds(make_counterfactuals(run), {"a": cascade}, SET, LdsConfig())


@pytest.mark.parametrize(
    ("setting", "value"),
    [*(("lds_share", share) for share in (0.0, 1.0, 0.01, -0.1, float("nan"))), ("lds_models", 2), ("lds_seed", -1)],
)
def test_wrong_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        LdsConfig(**{setting: value}).subsets(COUNT)
