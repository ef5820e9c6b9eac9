"""What the evaluation reports, as pure functions of numpy arrays: retrieval, rank correlation, uncertainty."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
from numpy.typing import ArrayLike

from attrib_jax.core.checks import check_positive, check_range


class Estimate(NamedTuple):
    """A mean and its standard error; the error of a single value is NaN."""

    mean: float
    error: float

    @property
    def in_errors(self) -> float:
        """The mean in units of its standard error: how far a difference is from nothing."""
        return float(np.divide(self.mean, self.error))


def mean_and_error(values: np.ndarray) -> Estimate:
    """Mean and standard error s / sqrt(n), s with n - 1 in the denominator, of independent values (n,).

    Raises ValueError where there are none.
    """
    values = _vector("values", values)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(error))


def crossed_mean(values: np.ndarray) -> Estimate:
    """Mean and standard error of values (S, Q) of S models each asked about Q queries, both taken as samples.

    sqrt(s_Q^2 / Q + s_S^2 / S), of the queries' means over models and the models' means over queries: what one model
    does to all queries is one event, however many queries there are. Somewhat too large rather than too small, since
    what a model does to one query counts in both. NaN for a single model or query.

    Raises ValueError for another shape.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values has shape {values.shape}; expected models and queries, at least one of each")
    over_models, over_queries = (mean_and_error(values.mean(axis=axis)) for axis in (0, 1))
    return Estimate(over_models.mean, float(np.hypot(over_models.error, over_queries.error)))


def over_sets(values: np.ndarray, sets: np.ndarray) -> Estimate:
    """Mean of values (Q,) less the mean over S models of `sets` (S, Q), query by query, and its standard error.

    What queries have in common cancels in the differences; the error is theirs over queries, and that of the S models'
    mean, which all queries share. NaN for a single model or query.

    Raises ValueError for shapes that do not fit.
    """
    values, sets = _vector("values", values), np.asarray(sets, np.float64)
    if sets.ndim != 2 or not len(sets) or sets.shape[1] != len(values):
        raise ValueError(f"values has {len(values)} entries and sets shape {sets.shape}; expected (S, {len(values)})")
    difference = mean_and_error(values - sets.mean(axis=0))
    return Estimate(difference.mean, float(np.hypot(difference.error, mean_and_error(sets.mean(axis=1)).error)))


def ranks(scores: np.ndarray) -> np.ndarray:
    """Scores (..., N) -> ranks (..., N), 1 for the highest; equal scores by rising position, as `Scores.top`."""
    scores = np.asarray(scores)
    result = np.empty(scores.shape, np.int64)
    order = np.argsort(-scores, axis=-1, kind="stable")
    np.put_along_axis(result, order, np.broadcast_to(np.arange(1, scores.shape[-1] + 1), scores.shape), axis=-1)
    return result


def recall_at(relevant_ranks: Sequence[int], k: int) -> float:
    """Share of the relevant items, given by their ranks (1 for the first), that are among the first `k`."""
    check_positive("k", k, integer=True)
    return float(np.mean(_vector("relevant_ranks", relevant_ranks) <= k))


def average_precision(relevant_ranks: Sequence[int]) -> float:
    """Mean over the relevant items of the precision at their rank; scikit-learn's, where no scores are equal."""
    ordered = np.sort(_vector("relevant_ranks", relevant_ranks))
    return float(np.mean(np.arange(1, len(ordered) + 1) / ordered))


def spearman(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Spearman's rank correlation over the last axis, ties at their mean rank; NaN where a vector is constant.

    Args:
      first, second: (..., M), shapes that broadcast.

    Returns:
      (...) float64.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not (first.ndim and second.ndim) or first.shape[-1] != second.shape[-1] or not first.shape[-1]:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}; expected pairs along the last axis")
    # By ranks, since scipy.stats.spearmanr takes a hundred times as long and warns of a constant.
    ranked = (scipy.stats.rankdata(values, axis=-1) for values in (first, second))
    left, right = (each - each.mean(axis=-1, keepdims=True) for each in ranked)
    norm = np.sqrt(np.sum(left**2, axis=-1) * np.sum(right**2, axis=-1))
    products = np.sum(left * right, axis=-1)
    return np.divide(products, norm, out=np.full(products.shape, np.nan), where=norm > 0)


class Lds(NamedTuple):
    """The linear datamodeling score.

    Attributes:
      per_query: (Q,) Spearman correlation of each query.
      mean: of them.
      error: standard error of the mean, from resampling models and queries.
      low, high: a 95 % interval of the mean, likewise.
      samples: (R,) the resampled means. Sample i of every method is of the same models and queries, so differences
        between methods are paired.
    """

    per_query: np.ndarray
    mean: float
    error: float
    low: float
    high: float
    samples: np.ndarray

    def less(self, other: "Lds") -> Estimate:
        """The difference of the means, and its standard error by the paired samples."""
        return Estimate(self.mean - other.mean, float(np.std(self.samples - other.samples, ddof=1)))


_SAMPLES_AT_ONCE = 50


def lds(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray, resamples: int = 1000, seed: int = 0) -> Lds:
    """Linear datamodeling score of an attribution (METHOD.md section 8; Park et al., TRAK, 2023, section 2).

    Of each query: Spearman's correlation, over models that were trained on subsets, between the sum of the scores of a
    model's training images and minus its loss on the query. Influential images lower the loss, so a good method
    has a positive score.

    Args:
      scores: (Q, N), larger is more influential.
      kept: (M, N) bool, which images each of the M subsets has.
      losses: (S, M, Q) of the queries under models of S training seeds, which are averaged; or (M, Q) of one.
      resamples: bootstrap samples of subsets and of queries, drawn together with replacement; at least 2.
      seed: of them.

    Raises ValueError for shapes that do not fit.
    """
    scores, kept, losses = np.asarray(scores, np.float64), np.asarray(kept, bool), np.asarray(losses, np.float64)
    if losses.ndim == 3:
        losses = losses.mean(axis=0)
    models, queries = losses.shape
    if kept.shape[0] != models or scores.shape != (queries, kept.shape[1]):
        raise ValueError(
            f"scores has shape {scores.shape}, kept {kept.shape} and losses {losses.shape}; expected (Q, N), (M, N) "
            "and (S, M, Q) or (M, Q)"
        )
    predicted, gain = scores @ kept.T.astype(np.float64), -losses.T  # (Q, M)
    values = spearman(predicted, gain)
    rng = np.random.default_rng(seed)
    # One draw of models for all queries: their losses come from the same trainings.
    draws = [(rng.integers(models, size=models), rng.integers(queries, size=queries)) for _ in range(resamples)]
    means = []
    for first in range(0, resamples, _SAMPLES_AT_ONCE):
        members, asked = (np.stack(each) for each in zip(*draws[first : first + _SAMPLES_AT_ONCE]))
        drawn = spearman(*(np.moveaxis(array[:, members], 1, 0) for array in (predicted, gain)))  # (R, Q)
        means.append(np.nanmean(np.take_along_axis(drawn, asked, axis=1), axis=1))
    samples = np.concatenate(means)
    low, high = np.quantile(samples, (0.025, 0.975))
    return Lds(values, float(np.mean(values)), float(np.std(samples, ddof=1)), float(low), float(high), samples)


def noise_ceiling(losses: np.ndarray) -> float:
    """The LDS that the losses of one further training seed would have: how far the ground truth knows itself.

    Spearman's correlation over subsets between a seed's losses and the mean of the other seeds', averaged over seeds
    and queries. A method that knew the expected loss of every subset would be above it.

    Args:
      losses: (S, M, Q) of the queries under models of S training seeds.

    Returns:
      NaN for a single seed.
    """
    losses = np.asarray(losses, np.float64)
    if len(losses) < 2:
        return float("nan")
    own = losses.transpose(0, 2, 1)  # (S, Q, M)
    others = (own.sum(axis=0) - own) / (len(own) - 1)
    return float(np.mean(spearman(own, others)))


def half_subsets(size: int, count: int, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """(count, size) bool: random subsets of round(share * size) of `size` rows; subset i is of (seed, i)."""
    check_range("share", share, 0.0, 1.0)
    kept = np.zeros((count, size), bool)
    for index in range(count):
        kept[index, np.random.default_rng([seed, index]).permutation(size)[: round(share * size)]] = True
    return kept


class RemovalCurve(NamedTuple):
    """What removing random images does: `counts` (C,) rising, from 0, and the mean effect of each (C,)."""

    counts: np.ndarray
    effects: np.ndarray

    @classmethod
    def fit(cls, counts: ArrayLike, effects: ArrayLike, weights: ArrayLike) -> "RemovalCurve":
        """The rising curve nearest to measured means, by weighted least squares (pool adjacent violators).

        Noise can make the mean effect of more images the smaller one; a curve that is to be inverted must not fall.

        Args:
          counts: of images removed, each once; nothing removed, with effect 0, is added.
          effects: mean effect of each count.
          weights: how many values each mean is of.
        """
        counts, effects, weights = (np.asarray(array, np.float64) for array in (counts, effects, weights))
        if len(np.unique(counts)) != len(counts) or (counts <= 0).any():
            raise ValueError(f"counts is {counts.tolist()}; expected numbers above 0, each once")
        order = np.argsort(counts)
        fitted = scipy.optimize.isotonic_regression(effects[order], weights=weights[order]).x
        return cls(np.append(0.0, counts[order]), np.append(0.0, np.maximum(fitted, 0.0)))

    def equivalent(self, effect: float) -> float:
        """How many random images have to be removed for `effect`, by linear interpolation.

        0 for an effect of nothing or less; infinity beyond the last point of the curve: more than was measured.
        """
        if effect <= 0:
            return 0.0
        if effect > self.effects[-1]:
            return float("inf")
        place = int(np.searchsorted(self.effects, effect))  # effects[place - 1] < effect <= effects[place]
        low, high = self.effects[place - 1], self.effects[place]
        share = (effect - low) / (high - low)
        return float(self.counts[place - 1] + share * (self.counts[place] - self.counts[place - 1]))


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}; expected a vector with at least one entry")
    return values
