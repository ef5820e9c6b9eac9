"""The linear datamodeling score on a tiny model."""

import dataclasses

import numpy as np
import pytest

from attrib_jax.evaluation.lds import LdsConfig, run_lds
from attrib_jax.evaluation.metrics import lds
from attrib_jax.evaluation.named import method_scores
from tests.evaluation.conftest import COUNT, METHODS, SET, make_counterfactuals


def test_scores_of_each_method_are_correlated_with_the_losses(run):
    counterfactuals, config = make_counterfactuals(run), LdsConfig(lds_models=5, lds_share=0.7, lds_seed=2)
    results, text = run_lds(counterfactuals, METHODS, SET, config)
    kept, trainings = config.subsets(COUNT)
    assert kept.shape == (5, COUNT) and set(kept.sum(axis=1)) == {9}
    losses = counterfactuals.results(trainings)["loss"][:, 1:]
    for name, method in METHODS.items():
        expected = lds(method_scores(run, name, method, SET.of("reported")), kept, losses)
        np.testing.assert_array_equal(results[name].per_query, expected.per_query)
    assert (run.root.workdir / "evaluation" / "lds-reported" / "lds.png").exists() and "| unlearn |" in text


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
