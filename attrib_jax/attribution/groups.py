"""What groups of training images, such as those of one artist, have of the scores of their images (docs/METHOD.md)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

BEST = 10
_RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)


class GroupShare(NamedTuple):
    """One group's part in a query, from the scores of its images.

    Attributes:
      group: its name.
      images: number of its images that have a score.
      total: sum of their scores.
      mean_best: mean of its best scores, `BEST` of them or as many as it has.
      share: sum of its positive scores over that of all images; NaN where no score is positive.
      low, high: 95 % bootstrap interval of the share over images.
    """

    group: str
    images: int
    total: float
    mean_best: float
    share: float
    low: float
    high: float


def group_shares(groups: Sequence[str], score: np.ndarray, seed: int = 0) -> list[GroupShare]:
    """The part of each group, the largest share first, equal ones by name.

    Negative scores count in the sums and not in the shares, which could not add up to 1 otherwise. The interval is over
    1,000 resamples of the N images, a function of `seed` and of the groups and scores in their order.

    Args:
      groups: (N,) name of each image's group.
      score: (N,) finite scores.

    Raises ValueError where the lengths differ or are 0.
    """
    score = np.asarray(score, np.float64)
    if score.shape != (len(groups),) or not len(groups):
        raise ValueError(f"groups has {len(groups)} entries and score shape {score.shape}: expected one for each image")
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    positive, count = np.maximum(score, 0), len(names)

    def shares(rows) -> np.ndarray:
        sums = np.bincount(member[rows], positive[rows], minlength=count)
        total = sums.sum()
        return sums / total if total > 0 else np.full(count, np.nan)

    low, high = _interval(shares, len(score), count, seed)
    found, whole = [], shares(slice(None))
    for place, name in enumerate(names.tolist()):
        own = np.sort(score[member == place])[::-1]
        numbers = own.sum(), own[:BEST].mean(), whole[place], low[place], high[place]
        found.append(GroupShare(name, len(own), *map(float, numbers)))
    return _sorted(found)


def counterfactual_shares(
    groups: Sequence[str], images: Sequence[int], before: np.ndarray, after: np.ndarray, seed: int = 0
) -> list[GroupShare]:
    """The part of each group, from a query's losses without it; ordered as by `group_shares`.

    A group's total is the mean of its losses less that of the losses before; every image has an even share of it, so
    `mean_best` is that share. The interval is over 1,000 resamples of the S draws, not of the images.

    Args:
      groups: (G,) their names.
      images: (G,) number of images of each.
      before: (S,) losses of the query under the model, one for each draw of timestep and noise.
      after: (G, S) losses under the model without each group, of the same draws.

    Raises ValueError where the shapes do not fit.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if len(images) != len(groups) or not before.size or after.shape != (len(groups), *before.shape) or before.ndim != 1:
        raise ValueError(
            f"before and after have shapes {before.shape} and {after.shape}, with {len(groups)} groups and "
            f"{len(images)} numbers of images: expected (S,) and (G, S) with S of 1 or more, and G of each"
        )
    change = after - before

    def shares(draws) -> np.ndarray:
        positive = np.maximum(change[:, draws].mean(axis=1), 0)
        return positive / positive.sum() if positive.sum() > 0 else np.full(len(groups), np.nan)

    total, whole = change.mean(axis=1), shares(slice(None))
    low, high = _interval(shares, len(before), len(groups), seed)
    return _sorted(
        [
            GroupShare(name, int(count), *map(float, (total[place], total[place] / count, *numbers)))
            for place, (name, count, *numbers) in enumerate(zip(groups, images, whole, low, high))
        ]
    )


def _interval(
    shares: Callable[[np.ndarray], np.ndarray], samples: int, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of `shares(indices)` (count,), over indices that are resampled from `samples`."""
    rng = np.random.default_rng(seed)
    resampled = np.stack([shares(rng.integers(0, samples, samples)) for _ in range(_RESAMPLES)])
    # A resample without a positive score says nothing.
    resampled = resampled[np.isfinite(resampled).all(axis=1)]
    low, high = np.quantile(resampled, _INTERVAL, axis=0) if len(resampled) else np.full((2, count), np.nan)
    return low, high


def _sorted(found: list[GroupShare]) -> list[GroupShare]:
    return sorted(found, key=lambda each: (-np.nan_to_num(each.share), each.group))
