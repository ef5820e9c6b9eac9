"""Scores of all images, or coarse to fine: all of them by a cheap score, the best again at the full setting."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from attrib_jax.attribution.scores import make_scores
from attrib_jax.core.fingerprint import array_digest
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.settings import PassSettings
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.score_files import write_scores

COARSE_FILE = "coarse.npz"

# values(paths, config, rows, queries, label) -> (len(rows), flips) for each of these queries, all rows if None.
Values = Callable[[Sequence[Path], PassSettings, np.ndarray | None, Sequence[int], str], list[np.ndarray]]
# base(config, rows, path, passes) -> (len(rows), flips), the losses that values are compared with.
Base = Callable[..., np.ndarray]


def cascade_scores(
    run: Run, folders: Sequence[Path], config: PassSettings, values: Values, base: Base | None
) -> list[Scores]:
    """Scores of the finalists of every query; the coarse scores of all images are in its `coarse.npz`.

    Args:
      run: the data set.
      folders: a folder for each query.
      config: with `cascade` above 0.
      values: losses after unlearning of each query, or linearised scores.
      base: losses before unlearning; None for linearised scores.
    """
    coarse = config.coarse()
    before = None if base is None else base(coarse)
    everyone = range(len(folders))
    found = values([folder / "coarse" for folder in folders], coarse, None, everyone, "coarse ")
    finalists = []
    for folder, each in zip(folders, found):
        scores = make_scores(run.data.row_ids, each, before, coarse.flips)
        run_on_host0(functools.partial(write_scores, scores, folder / COARSE_FILE))
        # Positions, rising; equal scores go by row id, as in `Scores.top`.
        best = np.lexsort((scores.row_id, -scores.score))[: config.num_finalists(len(scores))]
        finalists.append(np.sort(best))
    return finalist_scores(run, folders, config, finalists, values, base)


def finalist_scores(
    run: Run,
    folders: Sequence[Path],
    config: PassSettings,
    finalists: Sequence[np.ndarray],
    values: Values,
    base: Base | None,
) -> list[Scores]:
    """Scores of some images for each query, as `cascade_scores` of those that its coarse scores chose.

    Args:
      run, folders, config, values, base: as in `cascade_scores`.
      finalists: rising positions in the encoded data set, for each query.
    """
    row_ids = run.data.row_ids
    if base is None:
        # One pass over the finalists of any query: another query costs little in it.
        rows = np.unique(np.concatenate(finalists))
        found = values([_finals_folder(folder, rows) for folder in folders], config, rows, range(len(folders)), "")
        return [
            make_scores(row_ids[own], each[np.searchsorted(rows, own)], None, config.flips)
            for own, each in zip(finalists, found)
        ]
    results = []
    for query, (folder, rows) in enumerate(zip(folders, finalists)):
        path = _finals_folder(folder, rows)
        before = base(config, rows, path / "before", len(folders))
        (after,) = values([path], config, rows, [query], "")
        results.append(make_scores(row_ids[rows], after, before, config.flips))
    return results


def _finals_folder(folder: Path, rows: np.ndarray) -> Path:
    """A folder for these rows alone: other finalists, as another kind of device may choose them, get another."""
    return folder / f"finalists-{array_digest(np.asarray(rows, '<i8'))[:8]}"
