"""From scores to what is drawn: the ranking, its cards, and one number format for the whole report."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core import types
from attrib_jax.report.data import ReportData, check_image

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class ScoreScale(NamedTuple):
    """Prints scores as multiples of 10**exponent with a fixed number of `decimals`."""

    exponent: int
    decimals: int

    def number(self, score: float) -> str:
        """The multiple alone, with a typographic minus: 8.42, −0.30."""
        text = f"{score / 10.0**self.exponent:.{self.decimals}f}"
        if float(text) == 0:
            text = text.removeprefix("-")
        return text.replace("-", "−")

    @property
    def unit(self) -> str:
        """The factor that belongs after every number: '×10⁻⁴', or nothing where the exponent is 0."""
        return f"×10{str(self.exponent).translate(_SUPERSCRIPTS)}" if self.exponent else ""

    def with_unit(self, score: float) -> str:
        """Number and factor, for text where the unit is not already stated."""
        return f"{self.number(score)} {self.unit}".rstrip()


class Card(NamedTuple):
    """One training image of the report.

    `image` is (H, W, 3) uint8, already mirrored where `mirrored`, or None without images. `relative` is the score
    as a share of rank 1's, in [0, 1], or None where rank 1 is not positive. `duplicate_of` is the rank of the first
    card of the same group above this one. `losses` is (before, after) of the winning flip, or of the mean over flips.
    """

    rank: int
    row_id: int
    score: float
    relative: float | None
    captions: tuple[str, ...]
    mirrored: bool
    image: np.ndarray | None
    duplicate_of: int | None
    losses: tuple[float, float] | None


class Owed(NamedTuple):
    """One training image of a region: as in `Card`, with its share of the region's weight as it is shown."""

    row_id: int
    share: str
    caption: str
    mirrored: bool
    image: np.ndarray | None


class RegionCell(NamedTuple):
    """A region of the query: its box in per cent of the query's sides, and its images, best first."""

    left: float
    top: float
    width: float
    height: float
    images: tuple[Owed, ...]


def score_scale(scores: np.ndarray) -> ScoreScale:
    """One scale for (N,) scores: set by the largest magnitude, and without a factor where plain decimals read well."""
    largest = float(np.max(np.abs(scores)))
    if largest == 0:
        return ScoreScale(0, 2)
    exponent = int(np.floor(np.log10(largest)))
    if -1 <= exponent <= 2:
        return ScoreScale(0, 3 if exponent < 1 else 3 - exponent)
    return ScoreScale(exponent, 2)


def ranking(report: ReportData) -> np.ndarray:
    """(N,) positions, most influential first; equal scores in row-id order, whatever the order of the data."""
    return types.ranking(np.asarray(report.score, np.float64), np.asarray(report.row_id))


def top_cards(report: ReportData) -> list[Card]:
    """The min(top_k, N) most influential images, rank 1 first."""
    order = ranking(report)[: report.top_k]
    first_of_group: dict[Any, int] = {}
    cards = []
    for rank, position in enumerate(order, start=1):
        group = None if report.group is None else _look_up(report.group, int(report.row_id[position]))
        seen = None if group is None else first_of_group.setdefault(group, rank)
        cards.append(_card(report, rank, position, order[0], None if seen == rank else seen))
    return cards


def distinct_cards(report: ReportData, count: int) -> list[Card]:
    """The first image of each group, best first, up to `count` groups; an image without a group is one of its own.

    Empty where the data set has no groups.
    """
    if report.group is None:
        return []
    order, seen, cards = ranking(report), set(), []
    for rank, position in enumerate(order, start=1):
        group = _look_up(report.group, int(report.row_id[position]))
        if group is None or group not in seen:
            seen.add(group)
            cards.append(_card(report, rank, position, order[0], None))
            if len(cards) == count:
                break
    return cards


def least_cards(report: ReportData) -> list[Card]:
    """The up to least_k lowest scores, lowest last, without the images of the top."""
    order = ranking(report)
    start = max(len(order) - report.least_k, report.top_k)
    return [_card(report, rank, order[rank - 1], order[0], None) for rank in range(start + 1, len(order) + 1)]


def region_cells(report: ReportData) -> list[list[RegionCell]]:
    """The regions as they lie in the query: rows of cells; empty without regions."""
    rows: dict[float, list[RegionCell]] = {}
    for (x0, y0, x1, y1), images in report.regions:
        left, top, width, height = (round(100 * side, 3) for side in (x0, y0, x1 - x0, y1 - y0))
        owed = tuple(_owed(report, *each) for each in images)
        rows.setdefault(y0, []).append(RegionCell(left, top, width, height, owed))
    return list(rows.values())


def _owed(report: ReportData, row_id: int, flip: int, share: float) -> Owed:
    image = None if report.image is None else _look_up(report.image, row_id)
    if image is not None:
        check_image(image, f"image({row_id})")
        image = image[:, ::-1] if flip else image
    captions = [text for text in map(str, _look_up(report.captions, row_id)) if text.strip()]
    # Two digits: 42 %, 1.3 %, 0.042 %.
    shown = f"{float(f'{100 * share:.1e}'):.3g} %" if share >= 1e-6 else "0 %"
    return Owed(row_id, shown, captions[0] if captions else f"row {row_id}", bool(flip), image)


def _card(report: ReportData, rank: int, position: int, first: int, duplicate_of: int | None) -> Card:
    row_id, score, best = int(report.row_id[position]), float(report.score[position]), float(report.score[first])
    mirrored = report.flip is not None and bool(report.flip[position])
    image = None if report.image is None else _look_up(report.image, row_id)
    if image is not None:
        check_image(image, f"image({row_id})")
        image = image[:, ::-1] if mirrored else image
    captions = tuple(text for text in map(str, _look_up(report.captions, row_id)) if text.strip())
    return Card(
        rank=rank,
        row_id=row_id,
        score=score,
        relative=float(np.clip(score / best, 0.0, 1.0)) if best > 0 else None,
        captions=captions or ((f"row {row_id}",) if image is None else ("(no caption)",)),
        mirrored=mirrored,
        image=image,
        duplicate_of=duplicate_of,
        losses=_losses(report, position),
    )


def _losses(report: ReportData, position: int) -> tuple[float, float] | None:
    if report.loss_before is None or report.loss_after is None:
        return None
    flips = slice(None) if report.flip is None else int(report.flip[position])
    before, after = (np.mean(losses[position][flips]) for losses in (report.loss_before, report.loss_after))
    return float(before), float(after)


def _look_up(source: Callable[[int], Any] | Mapping[int, Any], row_id: int) -> Any:
    return source(row_id) if callable(source) else source[row_id]
