"""Shares of groups: sums, the mean of the best, and the bootstrap interval against a plain loop."""

import math

import numpy as np
import pytest

from attrib_jax.attribution.groups import group_shares


def test_sums_means_and_shares_are_those_of_the_groups_images():
    groups = ["moon", "sea"] * 15 + ["sun"]
    score = np.random.default_rng(0).normal(size=31)
    found = {each.group: each for each in group_shares(groups, score)}
    for name in ("moon", "sea", "sun"):
        own = np.array([value for group, value in zip(groups, score) if group == name])
        each = found[name]
        assert each.images == len(own) and each.total == pytest.approx(own.sum())
        assert each.mean_best == pytest.approx(np.mean(sorted(own)[-10:]))
        assert each.share == pytest.approx(own[own > 0].sum() / score[score > 0].sum())
        assert each.low <= each.share <= each.high
    assert sum(each.share for each in found.values()) == pytest.approx(1)


def test_the_interval_is_that_of_resampled_images():
    groups, score = ["a"] * 40 + ["b"] * 60, np.random.default_rng(1).uniform(size=100)
    found = group_shares(groups, score, seed=7)[1]
    rng, shares = np.random.default_rng(7), []
    for _ in range(1000):
        rows = rng.integers(0, 100, 100)
        shares.append(sum(score[row] for row in rows if row < 40) / score[rows].sum())
    assert found.group == "a"
    np.testing.assert_allclose((found.low, found.high), np.quantile(shares, (0.025, 0.975)))
    np.testing.assert_allclose(shares, found.share, atol=0.3)


def test_order_is_by_share_and_then_name_and_no_positive_score_means_no_share():
    assert [each.group for each in group_shares(["c", "b", "a", "b"], [2.0, 1.0, 2.0, -9.0])] == ["a", "c", "b"]
    none = group_shares(["b", "a"], [-1.0, -2.0])
    assert [(each.group, each.total) for each in none] == [("a", -2.0), ("b", -1.0)]
    assert all(math.isnan(value) for each in none for value in (each.share, each.low, each.high))


@pytest.mark.parametrize(("groups", "score"), [(["a"], [1.0, 2.0]), ([], [])])
def test_lengths_that_do_not_fit_are_refused(groups, score):
    with pytest.raises(ValueError, match=f"groups has {len(groups)} entries"):
        group_shares(groups, score)
