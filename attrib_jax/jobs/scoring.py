"""Scores of unlearned queries: exact or linearised, of all pictures or coarse to fine."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribution.scores import combine_flips, combine_scores
from attrib_jax.core.types import Scores
from attrib_jax.jobs.base_losses import BaseLosses
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.linear import weight_change
from attrib_jax.jobs.programs import ScorePrograms
from attrib_jax.jobs.queries import linear_values, query_values
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.score_files import write_scores

COARSE_FILE = "coarse.npz"
_LABELS = {"exact": "losses after", "linear": "linearised scores"}


class Scorer:
    """Scores a data set for unlearned queries, all of them in one pass."""

    def __init__(
        self,
        programs: ScorePrograms,
        data: EncodedDataset,
        base: BaseLosses,
        timed: Callable[[str], contextlib.AbstractContextManager],
    ):
        """`timed(stage)` is a context that measures."""
        self._programs, self._data, self._base, self._timed = programs, data, base, timed

    def scores(self, folders: Sequence[Path], moved: Sequence[Any], config: AttributeConfig) -> list[Scores]:
        """Scores of every query, given its folder and the weights that unlearning it gave.

        With a cascade they are of its finalists alone, and the coarse scores of all pictures are in `coarse.npz` in
        the query's folder.
        """
        if config.score == "linear":
            selected = self._programs.selected(config)
            return self.linear_scores(folders, [weight_change(tree, selected) for tree in moved], config)
        return self._scores(folders, moved, config)

    def linear_scores(self, folders: Sequence[Path], changes: Sequence[Any], config: AttributeConfig) -> list[Scores]:
        """`scores` given each query's weight change, a nested dict like the selected weights, of any size.

        `config.score` has to be `linear`.
        """
        return self._scores(folders, changes, config)

    def _scores(self, folders, weights, config: AttributeConfig) -> list[Scores]:
        """`weights` are moved ones for exact scores, changes for linear ones; so they are in all that follows."""
        if config.cascade:
            return self._cascade(folders, weights, config)
        before = self._base.losses(config) if config.score == "exact" else None
        values = self._values(folders, weights, config)
        return [make_scores(self._data.row_ids, each, before, config) for each in values]

    def _values(self, folders, weights, config, rows=None, prefix: str = "") -> list[np.ndarray]:
        label = prefix + _LABELS[config.score]
        run = linear_values if config.score == "linear" else query_values
        with self._timed(label):
            return run(folders, weights, config, self._programs, self._data, label, rows)

    def _cascade(self, folders, weights, config: AttributeConfig) -> list[Scores]:
        coarse = config.coarse()
        before = self._base.losses(coarse) if config.score == "exact" else None
        values = self._values([folder / "coarse" for folder in folders], weights, coarse, prefix="coarse ")
        finalists = []
        for folder, each in zip(folders, values):
            scores = make_scores(self._data.row_ids, each, before, coarse)
            run_on_host0(functools.partial(write_scores, scores, folder / COARSE_FILE))
            finalists.append(best_positions(scores, config.num_finalists(len(scores))))
        if config.score == "linear":
            return self._linear_finals(folders, weights, finalists, config)
        return [self._exact_finals(*query, config, len(folders)) for query in zip(folders, weights, finalists)]

    def _exact_finals(self, folder: Path, moved: Any, rows: np.ndarray, config, num_queries: int) -> Scores:
        path = _finals_folder(folder, rows)
        before = self._base.of_rows(config, rows, path / "before", num_queries)
        (after,) = self._values([path], [moved], config, rows)
        return make_scores(self._data.row_ids[rows], after, before, config)

    def _linear_finals(self, folders, changes, finalists: Sequence[np.ndarray], config) -> list[Scores]:
        # One pass over the finalists of any query: another query costs little in it.
        rows = np.unique(np.concatenate(finalists))
        values = self._values([_finals_folder(folder, rows) for folder in folders], changes, config, rows)
        return [
            make_scores(self._data.row_ids[own], each[np.searchsorted(rows, own)], None, config)
            for own, each in zip(finalists, values)
        ]


def make_scores(
    row_id: np.ndarray, values: np.ndarray, loss_before: np.ndarray | None, config: AttributeConfig
) -> Scores:
    """Scores from losses after unlearning (N, flips), given those before, or else from linearised scores."""
    if loss_before is None:
        score, flip = combine_flips(values, config.flips)
        loss_after = None
    else:
        score, flip = combine_scores(loss_before, values, config.flips)
        loss_after = values
    return Scores(row_id, score, loss_before, loss_after, None if config.flips == "mean" else flip)


def best_positions(scores: Scores, count: int) -> np.ndarray:
    """Positions of the `count` largest scores, rising; equal scores go by row id, as in `Scores.top`."""
    return np.sort(np.lexsort((scores.row_id, -scores.score))[:count])


def _finals_folder(folder: Path, rows: np.ndarray) -> Path:
    """A folder for these rows alone: other finalists, as another kind of device may choose them, get another."""
    digest = hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()[:8]
    return folder / f"finalists-{digest}"
