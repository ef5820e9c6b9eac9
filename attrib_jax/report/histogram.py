"""Geometry of the histogram of all scores: counts on a logarithmic axis, the top K apart from the rest."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attrib_jax.report.cards import Card, ScoreScale

_NUM_BINS = 64
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 64
_THUMB, _MAX_THUMBS = 40, 4
# The axis starts here rather than at 1, so that a bin with one image has a height.
_FLOOR = 0.6


class Bar(NamedTuple):
    """One bin in SVG units; `top` when it holds only images of the top K."""

    x: float
    y: float
    width: float
    height: float
    top: bool
    title: str


class Mark(NamedTuple):
    """A position on an axis, in SVG units, with its label."""

    at: float
    label: str


class Thumb(NamedTuple):
    """A card's image above its score."""

    card: Card
    x: float
    y: float
    size: int
    score_x: float


class Histogram(NamedTuple):
    """All that the SVG template draws, in units of a `width` x `height` view box."""

    width: int
    height: int
    left: float
    right: float
    baseline: float
    top: float
    bars: list[Bar]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    rug: list[float]
    thumbs: list[Thumb]
    zero: float | None


def bin_scores(scores: np.ndarray, top_k: int, num_bins: int = _NUM_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (B + 1,) and two counts (B,) over (N,) `scores`: of the top K, and of the rest.

    One edge lies midway between ranks K and K + 1, so that no bin mixes the two unless scores tie. Zero is within the
    edges where it is near the scores.
    """
    descending = np.sort(np.asarray(scores, np.float64))[::-1]
    low, high = descending[-1], descending[0]
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - 0.5, high + 0.5) if low == 0 else (min(low, 0.0), max(high, 0.0))
    elif 0 < low < span / 2:
        low = 0.0
    elif -span / 2 < high < 0:
        high = 0.0
    # Half an empty bin at each end keeps the extreme scores off the frame.
    width = (high - low) / (num_bins - 1)
    low, high = low - width / 2, high + width / 2
    if top_k < len(descending):
        cut = (descending[top_k - 1] + descending[top_k]) / 2
        low = cut - math.ceil((cut - low) / width) * width
    # Whole bins from `low` over `high`; the last few units in the last place belong to the last bin.
    edges = low + width * np.arange(math.ceil((high - low) / width - 1e-9) + 1)
    places = np.clip(np.floor((descending - low) / width).astype(int), 0, len(edges) - 2)
    top, rest = (np.bincount(part, minlength=len(edges) - 1) for part in (places[:top_k], places[top_k:]))
    return edges, top, rest


def nice_ticks(low: float, high: float, target: int) -> list[tuple[float, str]]:
    """(value, label) at the multiples of 1, 2 or 5 times a power of ten in [low, high], about `target` of them."""
    raw = (high - low) / target
    power = math.floor(math.log10(raw))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= raw * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, f"{n * step:.{decimals}f}".replace("-", "−")) for n in multiples]


def lay_out(scores: np.ndarray, cards: Sequence[Card], scale: ScoreScale, width: int, height: int) -> Histogram:
    """Places (N,) `scores` and the top `cards` in a `width` x `height` view box."""
    edges, top_counts, rest_counts = bin_scores(scores, len(cards))
    counts = top_counts + rest_counts
    left, right, baseline, top = _LEFT, width - _RIGHT, height - _BOTTOM, _TOP
    # The room above the tallest bar is for the images where the tall bars are elsewhere.
    ceiling = max(float(counts.max()) * 1.3, 12.0)

    def x_of(score: float) -> float:
        return left + (score - edges[0]) / (edges[-1] - edges[0]) * (right - left)

    def y_of(count: float) -> float:
        share = math.log(max(count, _FLOOR) / _FLOOR) / math.log(ceiling / _FLOOR)
        return baseline - share * (baseline - top)

    bars = []
    for index in np.flatnonzero(counts):
        count, start, stop = int(counts[index]), edges[index], edges[index + 1]
        gap = min(1.0, 0.15 * (x_of(stop) - x_of(start)))
        title = f"{count} image{'s' if count > 1 else ''} from {scale.number(start)} to {scale.with_unit(stop)}"
        y = y_of(count)
        bars.append(
            Bar(x_of(start) + gap / 2, y, x_of(stop) - x_of(start) - gap, baseline - y, not rest_counts[index], title)
        )
    unit = 10.0**scale.exponent
    x_ticks = nice_ticks(edges[0] / unit, edges[-1] / unit, target=max(3, width // 110))
    return Histogram(
        width=width,
        height=height,
        left=left,
        right=right,
        baseline=baseline,
        top=top,
        bars=bars,
        x_ticks=[Mark(x_of(value * unit), label) for value, label in x_ticks],
        y_ticks=[Mark(y_of(10**p), f"{10**p:,}") for p in range(int(math.log10(ceiling)) + 1)],
        rug=[x_of(card.score) for card in cards],
        thumbs=_place_thumbs(cards, bars, x_of, left, right, top),
        zero=x_of(0.0) if edges[0] <= 0 <= edges[-1] else None,
    )


def _place_thumbs(cards, bars, x_of, left, right, top) -> list[Thumb]:
    """The best cards' images above their bars, best first, leaving out any that would cover another or a bar."""
    thumbs: list[Thumb] = []
    for card in cards:
        score_x = x_of(card.score)
        x = min(max(score_x - _THUMB / 2, left + 4), right - _THUMB)
        under = [bar.y for bar in bars if bar.x < x + _THUMB and x < bar.x + bar.width]
        y = min(under) - _THUMB - 14
        if card.image is None or y < top or any(abs(x - other.x) < _THUMB + 8 for other in thumbs):
            continue
        thumbs.append(Thumb(card, x, y, _THUMB, score_x))
        if len(thumbs) == _MAX_THUMBS:
            break
    return thumbs
