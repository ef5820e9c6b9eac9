"""Shares of groups: sums, the mean of the best, and the bootstrap interval against a plain loop."""

import math

import numpy as np
import pytest

from attrib_jax.attribution.groups import counterfactual_shares, group_shares


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


def test_parts_of_losses_without_each_group_are_of_their_rises_with_an_interval_over_draws():
    rng = np.random.default_rng(2)
    before = rng.uniform(1, 2, 50)
    after = before + np.array([[0.3], [0.1], [-0.2]]) + 0.05 * rng.normal(size=(3, 50))
    found = counterfactual_shares(["a", "b", "c"], [2, 5, 1], before, after, seed=3)
    assert [(each.group, each.images) for each in found] == [("a", 2), ("b", 5), ("c", 1)]
    rises = (after - before).mean(axis=1)
    np.testing.assert_allclose([each.total for each in found], rises)
    np.testing.assert_allclose([each.mean_best for each in found], rises / [2, 5, 1])
    np.testing.assert_allclose([each.share for each in found], [*rises[:2] / rises[:2].sum(), 0])
    rng, shares = np.random.default_rng(3), []
    for _ in range(1000):
        draws = rng.integers(0, 50, 50)
        first, second, _ = np.mean((after - before)[:, draws], axis=1)
        shares.append(first / (first + second))
    np.testing.assert_allclose((found[0].low, found[0].high), np.quantile(shares, (0.025, 0.975)))
    none = counterfactual_shares(["a", "b"], [1, 1], before, np.stack([before - 1, before]))
    assert all(math.isnan(each.share) and math.isnan(each.low) for each in none)
    with pytest.raises(ValueError, match=r"shapes \(50,\) and \(3, 50\), with 2 groups"):
        counterfactual_shares(["a", "b"], [1, 1], before, after)
