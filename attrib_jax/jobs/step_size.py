"""How far a query is unlearned: what a step does to random training images, and the step that does a given amount.

docs/METHOD.md section 3, "The size of the step".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from attrib_jax.core.fingerprint import name_hash
from attrib_jax.core.weights import Params, merge_weights, select_weights
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encoded_dataset import EncodedDataset, encoded_queries
from attrib_jax.jobs.losses import loss_program
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.jobs.settings import PassSettings

# Where the search begins: the paper's step.
FIRST_STEP = 0.01
# Noises under which the query's own loss is taken at each timestep.
_QUERY_NOISES = 8
# The search ends where the rise is this close to the one that is asked for, relative to it.
_TOLERANCE = 0.01
_MAX_TRIALS = 24
_LARGEST_FACTOR = 30.0


class MeanLosses(NamedTuple):
    """Mean strided losses under one set of weights: of random training images, and of the query as a whole."""

    images: float
    query: float


class LossProbe:
    """Mean losses of the same random training images, and of a query, under any weights of a subset.

    The program is that of the exact scores, under the same noise, so that nothing else is compiled for it.
    """

    def __init__(self, run: Run, config: PassSettings, weights: str, num_images: int):
        """`num_images` are drawn from the data set, all of a smaller one; `weights` is the subset that moves."""
        data, config = run.data, dataclasses.replace(config, flips="none", captions="first", precision="float32")
        rng = np.random.default_rng([config.loss_seed, name_hash("random training images")])
        self.rows = np.sort(rng.permutation(len(data))[:num_images])
        self._data, self._program = data, loss_program(run, config)
        selected, rest = select_weights(run.pipeline.params["unet"], weights)
        self._selected, self._rest = selected, self._program.place(rest)
        self._images_before = self._mean(selected, data, self.rows)

    def losses(self, selected: Params, query: PreparedQuery) -> MeanLosses:
        """Mean losses of the random training images and of `query`."""
        return MeanLosses(self._mean(selected, self._data, self.rows), self._query(selected, query))

    def before(self, query: PreparedQuery) -> MeanLosses:
        """As `losses`, under the model's own weights."""
        return MeanLosses(self._images_before, self._query(self._selected, query))

    def step_size(self, moved: Callable[[float], Params], loss_rise: float) -> float:
        """The step at which the mean loss of the random images is `1 + loss_rise` times what it was.

        Args:
          moved: step size -> the weights after the step.
          loss_rise: relative to the loss under the model's own weights.

        Raises ValueError where no step reaches it.
        """
        before = self._images_before

        def rise(step: float) -> float:
            return self._mean(moved(step), self._data, self.rows) - before

        return find_step(rise, loss_rise * before, loss_rise)

    def _query(self, selected: Params, query: PreparedQuery) -> float:
        data = _query_data(query)
        return self._mean(selected, data, np.arange(len(data)))

    def _mean(self, selected: Params, data: EncodedDataset, rows: np.ndarray) -> float:
        weights = merge_weights(self._program.place(selected), self._rest)
        return float(self._program(weights, data, rows).mean())


def find_step(rise: Callable[[float], float], target: float, loss_rise: float) -> float:
    """The step size whose `rise` is `target`, rounded down to two digits; by the secant in logarithms, bracketed.

    Two digits, so that rounding on another machine does not change it.

    Args:
      rise: step size -> rise of a mean loss, 0 at 0; it may be NaN or infinite for a large step.
      target: above 0.
      loss_rise: what the user gave, for messages.

    Raises ValueError where `rise` stays below `target` however large the step is.
    """
    step, low, high = FIRST_STEP, 0.0, math.inf
    known: dict[float, float] = {}
    for _ in range(_MAX_TRIALS):
        value = rise(step)
        if not math.isfinite(value) or value > target:
            high = min(high, step)
        else:
            low = max(low, step)
        if math.isfinite(value) and value > 0:
            known[step] = value
        if math.isfinite(value) and abs(value / target - 1) <= _TOLERANCE:
            return _two_digits(step)
        if low and high / low < 1 + _TOLERANCE / 4:
            return _two_digits(low)
        step = _next_step(step, value, target, known)
        if not low < step < high:
            step = _middle(low, high)
    if low and math.isfinite(high):
        return _two_digits(low)
    raise ValueError(
        f"loss_rise is {loss_rise:g}, and no step size was found that raises the loss of random training images by "
        f"as much: at {step:.3g} it is {'too small' if math.isinf(high) else 'too large'} still. Give a step_size."
    )


def _next_step(step: float, value: float, target: float, known: dict[float, float]) -> float:
    """By the power law through the two known points nearest to the target; through one, of the second power."""
    if not math.isfinite(value):
        return step / _LARGEST_FACTOR
    if value <= 0:
        return step * _LARGEST_FACTOR
    power = 2.0
    if len(known) > 1:
        first, second = sorted(known, key=lambda each: abs(math.log(known[each] / target)))[:2]
        power = math.log(known[first] / known[second]) / math.log(first / second)
        power = min(max(power, 0.5), 6.0)
        step, value = first, known[first]
    factor = (target / value) ** (1 / power)
    return step * min(max(factor, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)


def _middle(low: float, high: float) -> float:
    """A step between two, of which one may not be known yet: `low` 0 or `high` infinite."""
    if math.isinf(high):
        return low * _LARGEST_FACTOR
    return math.sqrt(low * high) if low else high / _LARGEST_FACTOR


def _two_digits(step: float) -> float:
    """`step` rounded down to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(step)) - 1)
    return float(f"{math.floor(step / unit * (1 + 1e-9)) * unit:.1e}")


def _query_data(query: PreparedQuery) -> EncodedDataset:
    """The query as a data set: once for each noise."""
    rows = np.arange(_QUERY_NOISES, dtype=np.int32)
    latents, text = jax.tree.map(
        lambda leaf: np.repeat(np.asarray(leaf)[None], len(rows), 0), (query.latents, query.text)
    )
    return encoded_queries(rows, latents, text, "the query")
