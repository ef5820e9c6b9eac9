"""What a report shows, checked once: plain strings and numpy arrays, no models and no files."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from attrib_jax.attribution.groups import GroupShare


class Timing(NamedTuple):
    """Wall-clock `seconds` of one stage; `reused` when a stored result stood in for the work."""

    seconds: float
    reused: bool = False


class Region(NamedTuple):
    """A box of the query, and what it owes to whom.

    `box` is (x0, y0, x1, y1) as shares of the query's sides; `images` are (row id, flip, share of the box's weight),
    best first.
    """

    box: tuple[float, float, float, float]
    images: tuple[tuple[int, int, float], ...]


class Credit(NamedTuple):
    """One line of attribution or licence, and the address that its text links to, if any."""

    text: str
    url: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportData:
    """One query's attribution as the page and the contact sheet show it.

    Attributes:
      query_image: (H, W, 3) uint8, the query as scored.
      query_name: short name of the query, as its folder is called.
      prompt: the text that the query was generated from or is scored with.
      query_settings: how the query came about, in display order, such as sampler, steps, guidance and seed.
      method: name of the attribution method.
      method_settings: settings of the method, in display order.
      model_name: what the model is called.
      dataset_name: what the training set is called.
      row_id: (N,) integers, unique, one for each scored training image.
      score: (N,) finite floats, larger is more influential.
      captions: row id -> captions of that image, a function or a mapping.
      image: row id -> (H, W, 3) uint8 or None where there is no image; None when the data set has none at all.
      group: row id -> a hashable label shared by near-duplicates, or None where an image has none.
      group_shares: part of each named group of training images, the largest share first; empty without such groups.
      groups_unlearned: whether these parts are of losses without each group, and not of the images' scores.
      flip: (N,) 0 or 1, which of the two mirror images gave the score; None when no single one did.
      loss_before, loss_after: (N, flips) losses under the original and the unlearned weights, both or neither.
      top_k: how many images to show from the top; more than N means all.
      least_k: how many to show from the bottom, never one that is already at the top.
      timings: stage -> Timing, in the order run.
      num_images: images of the training set, where only the most promising of them were scored; None for all.
      region: (x0, y0, x1, y1) in query pixels, x1 and y1 exclusive, when only that box was attributed.
      region_mask: (H, W) bool, the query pixels that were attributed, when they are no box.
      regions: regions of the query with the images that each owes most to, row by row; none for most methods.
      warnings: sentences that the reader should see first, such as a prompt that was cut.
      explanation: how to read the scores; None for a text that fits `method`.
      model_credit, dataset_credit: attribution lines for the foot of the page.

    Raises:
      ValueError: if an array has the wrong shape or values, with the name of the argument.
    """

    query_image: np.ndarray
    query_name: str
    prompt: str
    query_settings: Mapping[str, str]
    method: str
    method_settings: Mapping[str, str]
    model_name: str
    dataset_name: str
    row_id: np.ndarray
    score: np.ndarray
    captions: Callable[[int], Sequence[str]] | Mapping[int, Sequence[str]]
    image: Callable[[int], np.ndarray | None] | Mapping[int, np.ndarray] | None = None
    group: Callable[[int], Hashable] | Mapping[int, Hashable] | None = None
    group_shares: Sequence[GroupShare] = ()
    groups_unlearned: bool = False
    flip: np.ndarray | None = None
    loss_before: np.ndarray | None = None
    loss_after: np.ndarray | None = None
    top_k: int = 24
    least_k: int = 6
    timings: Mapping[str, Timing] = field(default_factory=dict)
    num_images: int | None = None
    region: tuple[int, int, int, int] | None = None
    region_mask: np.ndarray | None = None
    regions: Sequence[Region] = ()
    warnings: Sequence[str] = ()
    explanation: str | None = None
    model_credit: Credit | None = None
    dataset_credit: Credit | None = None

    def __post_init__(self):
        check_image(self.query_image, "query_image")
        row_id, score = np.asarray(self.row_id), np.asarray(self.score)
        if row_id.ndim != 1 or not row_id.size or not np.issubdtype(row_id.dtype, np.integer):
            raise ValueError(
                f"row_id has shape {row_id.shape} and dtype {row_id.dtype}: expected (N,) integers with N >= 1; "
                "pass the row ids of the scored images"
            )
        if np.unique(row_id).size != row_id.size:
            values, counts = np.unique(row_id, return_counts=True)
            raise ValueError(
                f"row_id holds {values[counts > 1][0]} more than once: expected one score an image; "
                "join the scores of an image first"
            )
        if score.shape != row_id.shape:
            raise ValueError(f"score has shape {score.shape}: expected {row_id.shape}, one for each row_id")
        bad = np.flatnonzero(~np.isfinite(score))
        if bad.size:
            raise ValueError(
                f"score has {bad.size} of {score.size} values that are not finite, the first {score[bad[0]]} at row_id "
                f"{row_id[bad[0]]}: expected finite scores; look for NaN in the weights or too large a step_size"
            )
        self._check_flips(row_id.size)
        for name, least in (("top_k", 1), ("least_k", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")
        self._check_region()
        for number, each in enumerate(self.regions):
            x0, y0, x1, y1 = each.box
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1) or not each.images:
                raise ValueError(
                    f"regions[{number}] has the box {each.box} and {len(each.images)} images: expected x0 < x1 and "
                    "y0 < y1 from 0 to 1, and at least one image"
                )
        if self.num_images is not None and self.num_images < row_id.size:
            raise ValueError(
                f"num_images is {self.num_images}: expected at least {row_id.size}, the number of scored images"
            )
        for name in ("model_credit", "dataset_credit"):
            credit = getattr(self, name)
            if credit and credit.url is not None and urlsplit(credit.url).scheme not in ("http", "https"):
                raise ValueError(f"{name}.url is {credit.url!r}: expected an http or https address, or None")

    @property
    def scored(self) -> str:
        """How many images the scores are of, in words."""
        count = len(self.row_id)
        if self.num_images in (None, count):
            return f"{count:,} image{'s' if count > 1 else ''} scored"
        return f"{count:,} of {self.num_images:,} images scored at the full setting"

    def _check_flips(self, num_rows: int) -> None:
        if (self.loss_before is None) != (self.loss_after is None):
            raise ValueError("loss_before and loss_after belong together: give both or neither")
        num_flips = 2
        if self.loss_before is not None and self.loss_after is not None:
            before, after = np.shape(self.loss_before), np.shape(self.loss_after)
            if before != after or before not in ((num_rows, 1), (num_rows, 2)):
                raise ValueError(
                    f"loss_before has shape {before} and loss_after {after}: expected both ({num_rows}, flips) with "
                    "1 or 2 flips"
                )
            num_flips = before[1]
        if self.flip is None:
            return
        flip = np.asarray(self.flip)
        if flip.shape != (num_rows,) or not np.isin(flip, np.arange(num_flips)).all():
            raise ValueError(
                f"flip has shape {flip.shape} and values {np.unique(flip)[:4].tolist()}: expected ({num_rows},) "
                f"integers below {num_flips}, or None when no single flip won"
            )

    def _check_region(self) -> None:
        size = self.query_image.shape[:2]
        mask = self.region_mask
        if mask is not None and (np.shape(mask) != size or mask.dtype != bool or not mask.any()):
            raise ValueError(
                f"region_mask has shape {np.shape(mask)}: expected {size} of bool, some of them True, as the query has"
            )
        if self.region is None:
            return
        height, width = size
        x0, y0, x1, y1 = self.region
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"region is {self.region}: expected x0 < x1 and y0 < y1 inside the query of {width} x {height} pixels"
            )


def check_image(image: Any, name: str) -> None:
    """Raises ValueError unless `image` is an (H, W, 3) uint8 array with at least one pixel."""
    shape, dtype = np.shape(image), getattr(image, "dtype", type(image).__name__)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
        raise ValueError(
            f"{name} has shape {shape} and dtype {dtype}: expected an (H, W, 3) uint8 image; "
            "map values in [-1, 1] to 0..255 first"
        )
