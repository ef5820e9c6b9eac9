"""Metrics against hand-worked cases, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from attrib_jax.evaluation.metrics import (
    RemovalCurve,
    average_precision,
    crossed_mean,
    half_subsets,
    lds,
    mean_and_error,
    noise_ceiling,
    over_sets,
    ranks,
    recall_at,
    spearman,
)


def test_mean_and_error_by_hand():
    estimate = mean_and_error(np.array([1.0, 3.0, 5.0]))
    assert estimate.mean == 3.0
    assert estimate.error == pytest.approx(2 / math.sqrt(3))
    assert estimate.in_errors == pytest.approx(1.5 * math.sqrt(3))
    assert math.isnan(mean_and_error(np.array([1.0])).error)
    with pytest.raises(ValueError, match="at least one entry"):
        mean_and_error(np.array([]))


def test_crossed_mean_by_hand():
    estimate = crossed_mean(np.array([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]]))
    # Means 2, 4, 6 of the queries and 3, 5 of the models.
    assert estimate.mean == 4.0
    assert estimate.error == pytest.approx(math.sqrt(4 / 3 + 2 / 2))
    assert math.isnan(crossed_mean(np.ones((1, 3))).error)
    with pytest.raises(ValueError, match=r"values has shape \(3,\)"):
        crossed_mean(np.ones(3))


def test_the_error_of_a_crossed_mean_is_that_of_repeated_studies():
    rng = np.random.default_rng(0)

    def study():
        models, queries = rng.normal(0, 0.5, (10, 1)), rng.normal(0, 0.7, 12)
        return crossed_mean(models + queries + rng.normal(0, 0.3, (10, 12)))

    studies = [study() for _ in range(500)]
    spread = np.std([each.mean for each in studies])
    assert np.sqrt(np.mean([each.error**2 for each in studies])) == pytest.approx(spread, rel=0.1)


def test_a_difference_over_sets_drops_what_queries_have_in_common():
    common = np.array([10.0, 200.0, -50.0])
    # The sets' means over queries are 1 and -1 from the common one.
    sets = common + np.array([[1.0], [-1.0]])
    estimate = over_sets(common + [1.0, 2.0, 3.0], sets)
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.error == pytest.approx(math.sqrt(1 / 3 + 2 / 2))
    with pytest.raises(ValueError, match=r"values has 2 entries and sets shape \(2, 3\)"):
        over_sets(np.ones(2), sets)


def test_ranks_break_ties_by_position():
    np.testing.assert_array_equal(ranks(np.array([[0.5, 2.0, 0.5, -1.0]])), [[2, 1, 3, 4]])


def test_recall_and_average_precision_by_hand():
    assert recall_at([1, 10, 11], 10) == pytest.approx(2 / 3)
    # Precisions 1/1, 2/3 and 3/6 at the three ranks.
    assert average_precision([6, 1, 3]) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="k is 0"):
        recall_at([1], 0)


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, relevant = rng.permutation(50), rng.random(50) < 0.2
        relevant[0] = True
        expected = sklearn.metrics.average_precision_score(relevant, scores)
        assert average_precision(ranks(scores)[relevant]) == pytest.approx(expected)


def test_spearman_is_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 6, 30), rng.normal(size=30)
        assert spearman(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    assert spearman([1, 2, 3], [10, 20, 5000]) == pytest.approx(1.0)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="expected pairs"):
        spearman([1, 2], [1, 2, 3])


def test_lds_of_exact_and_of_reversed_influence():
    rng = np.random.default_rng(0)
    kept, influence = half_subsets(40, 30), rng.normal(size=(3, 40))
    # Losses that are linear in the pictures: each lowers the loss by its influence.
    losses = 5.0 - kept @ influence.T
    exact = lds(influence, kept, losses, resamples=50)
    np.testing.assert_allclose(exact.per_query, 1.0)
    assert exact.mean == exact.low == exact.high == 1.0
    assert lds(-influence, kept, losses, resamples=50).mean == -1.0


def test_lds_interval_holds_the_mean_and_narrows_with_models():
    rng = np.random.default_rng(0)

    def measured(models):
        kept, influence = half_subsets(40, models), rng.normal(size=(4, 40))
        return lds(influence, kept, 5 * rng.normal(size=(models, 4)) - kept @ influence.T, resamples=200)

    few, many = measured(20), measured(300)
    assert few.low < few.mean < few.high and many.low < many.mean < many.high
    assert many.high - many.low < few.high - few.low


def test_lds_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"scores has shape \(2, 5\)"):
        lds(np.zeros((2, 5)), np.zeros((3, 4)), np.zeros((3, 2)))


def test_half_subsets_have_their_size_and_do_not_depend_on_the_count():
    kept = half_subsets(21, 6, share=0.5, seed=3)
    assert set(kept.sum(axis=1)) == {10}
    np.testing.assert_array_equal(kept[:2], half_subsets(21, 2, share=0.5, seed=3))
    assert (kept[0] != kept[1]).any() and (kept != half_subsets(21, 6, share=0.5, seed=4)).any()


def test_removal_curve_interpolates():
    curve = RemovalCurve.fit([100, 10], [4.0, 1.0], [5, 5])
    np.testing.assert_array_equal(curve.counts, [0, 10, 100])
    assert curve.equivalent(0.5) == pytest.approx(5.0)
    assert curve.equivalent(1.0) == pytest.approx(10.0)
    assert curve.equivalent(2.5) == pytest.approx(55.0)
    assert curve.equivalent(-1.0) == 0.0
    assert curve.equivalent(4.1) == math.inf


def test_removal_curve_pools_what_falls():
    # 3 and 1, of 1 and 3 values, pool to (3 + 3) / 4 = 1.5; the negative start is lifted to nothing.
    curve = RemovalCurve.fit([5, 10, 20, 40], [-0.5, 3.0, 1.0, 6.0], [1, 1, 3, 1])
    np.testing.assert_allclose(curve.effects, [0, 0, 1.5, 1.5, 6.0])
    # Flat stretches are reached at their beginning.
    assert curve.equivalent(1.5) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="each once"):
        RemovalCurve.fit([5, 5], [1.0, 2.0], [1, 1])


def test_the_ceiling_is_what_one_more_seed_would_score():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(40, 3))  # of 40 subsets, 3 queries
    assert noise_ceiling(np.stack([expected] * 3)) == pytest.approx(1)
    noisy = expected + rng.normal(size=(2, *expected.shape))
    pairs = [scipy.stats.spearmanr(noisy[0, :, query], noisy[1, :, query]).statistic for query in range(3)]
    assert noise_ceiling(noisy) == pytest.approx(np.mean(pairs))
    assert np.isnan(noise_ceiling(noisy[:1]))


def test_differences_of_lds_are_paired():
    rng = np.random.default_rng(1)
    scores, kept = rng.normal(size=(4, 30)), half_subsets(30, 25)
    losses = 5 * rng.normal(size=(25, 4)) - kept @ scores.T
    first, second = (lds(each, kept, losses) for each in (scores, scores + 0.01 * rng.normal(size=scores.shape)))
    # Both have the noise of the losses in common.
    assert second.less(first).error < 0.2 * first.error
    assert second.less(first).mean == second.mean - first.mean and first.less(first) == (0, 0)
