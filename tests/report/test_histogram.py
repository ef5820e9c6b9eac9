"""Binning against direct counts, and the layout's claims about what it marks."""

import numpy as np
import pytest

from attrib_jax.report.cards import score_scale, top_cards
from attrib_jax.report.histogram import bin_scores, lay_out, nice_ticks


@pytest.mark.parametrize("top_k", [1, 24, 900, 1000, 5000])
def test_bins_hold_every_score_and_never_mix_top_and_rest(top_k):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1e-6, 1000) + rng.exponential(5e-6, 1000)
    edges, top, rest = bin_scores(scores, top_k)
    np.testing.assert_array_equal(np.histogram(scores, edges)[0], top + rest)
    assert (top.sum(), rest.sum()) == (min(top_k, 1000), max(1000 - top_k, 0))
    assert not np.any((top > 0) & (rest > 0))
    assert edges[0] <= 0 <= edges[-1]


@pytest.mark.parametrize("value", [0.0, 3e-7, -2.0, 0.1])
@pytest.mark.parametrize("count", [1, 7])
def test_equal_scores_fill_one_bin(value, count):
    edges, top, rest = bin_scores(np.full(count, value), top_k=3)
    assert np.all(np.diff(edges) > 0)
    filled = np.flatnonzero(top + rest)
    assert filled.size == 1 and (top + rest)[filled[0]] == count
    assert edges[filled[0]] - 1e-9 <= value <= edges[filled[0] + 1] + 1e-9


def test_scores_a_rounding_error_apart_count_as_equal():
    scores = np.array([0.9, np.nextafter(0.9, 1.0), 0.9])
    edges, top, rest = bin_scores(scores, top_k=1)
    assert np.all(np.diff(edges) > 0) and (top + rest).sum() == 3


def test_far_zero_stays_outside():
    edges, _, _ = bin_scores(np.linspace(0.7, 0.9, 50), top_k=5)
    assert edges[0] > 0.6


def test_layout_marks_the_top_and_zero_and_keeps_images_apart(make_report):
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0, 1e-6, 395), [2e-5, 3e-5, 3.01e-5, 4e-5, 5e-5]])
    report = make_report(row_id=np.arange(400), score=scores, flip=None, top_k=5)
    cards = top_cards(report)
    plot = lay_out(scores, cards, score_scale(scores), 1000, 300)
    assert sum(bar.top for bar in plot.bars) == len({round(x, 6) for x in plot.rug}) - 1 == 4
    assert min(bar.x for bar in plot.bars if bar.top) > max(bar.x for bar in plot.bars if not bar.top)
    tallest = max(plot.bars, key=lambda bar: bar.height)
    assert abs(plot.zero - tallest.x) < 20
    assert all(plot.left <= bar.x and bar.x + bar.width <= plot.right + 1e-6 for bar in plot.bars)
    assert [thumb.card.rank for thumb in plot.thumbs] == [1, 2, 3, 5]
    places = sorted(thumb.x for thumb in plot.thumbs)
    assert min(np.diff(places)) >= plot.thumbs[0].size


def test_ticks_are_round_and_labelled_alike():
    assert nice_ticks(-0.3, 4.2, 9) == [(n / 2, f"{n / 2:.1f}") for n in range(9)]
    assert [label for _, label in nice_ticks(-41.0, 39.0, 4)] == ["−40", "−20", "0", "20"]
