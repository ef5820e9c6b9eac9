"""The batches of a training that goes without some images: what was seen elsewhere stays the same.

Everything that is drawn is a pure function of (seed, step, place in the batch): a model that lacks images sees, in
every other place, the batches that the full one saw, and in their places images drawn from the remaining ones.
"""

from typing import NamedTuple, Protocol

import numpy as np

from attrib_jax.jobs.encoded_dataset import EncodedDataset


class Recipe(Protocol):
    """What batches depend on: images a step, share of empty captions, and whether half of the images are mirrored."""

    @property
    def batch_size(self) -> int: ...

    @property
    def caption_dropout(self) -> float: ...

    @property
    def random_flips(self) -> bool: ...


class Training(NamedTuple):
    """One model to train: removed (R,), positions in the data set of the images it goes without; and its seed."""

    removed: np.ndarray
    seed: int = 0


class Draws(NamedTuple):
    """What S steps train on; int32 (S, B).

    Attributes:
      row: positions in the data set.
      flip: 1 for the mirror image.
      caption: positions in the data set's text states; -1 for the empty caption.
    """

    row: np.ndarray
    flip: np.ndarray
    caption: np.ndarray


def draw_batches(data: EncodedDataset, training: Training, recipe: Recipe, start: int, stop: int) -> Draws:
    """The batches of steps `start` to `stop`.

    Places in the batches go through the data set epoch by epoch, each a permutation of its own; where a removed image
    comes up, one of the remaining stands in, drawn by a number that belongs to the place.
    """
    size, batch = len(data), recipe.batch_size
    kept = np.setdiff1d(np.arange(size), training.removed)
    places = np.arange(start * batch, stop * batch)
    order = np.empty(len(places), np.int64)
    uniform = np.empty((4, len(places)))
    for epoch in range(places[0] // size, places[-1] // size + 1):
        here = places // size == epoch
        rng = np.random.default_rng([training.seed, epoch])
        permutation, numbers = rng.permutation(size), rng.random((4, size))
        order[here], uniform[:, here] = permutation[places[here] % size], numbers[:, places[here] % size]
    removed = np.zeros(size, bool)
    removed[training.removed] = True
    row = np.where(removed[order], kept[(uniform[0] * len(kept)).astype(np.int64)], order)
    flip = (uniform[1] < 0.5) if recipe.random_flips else np.zeros(len(places), bool)
    stored = data.positions[row]
    caption = data.first_caption[stored] + (uniform[2] * data.num_captions[row]).astype(np.int64)
    caption = np.where(uniform[3] < recipe.caption_dropout, -1, caption)
    return Draws(*(array.astype(np.int32).reshape(stop - start, batch) for array in (stored, flip, caption)))


def check_removed(removed: np.ndarray, size: int) -> None:
    """Raises ValueError unless these are positions in a data set of `size` images that leave at least one."""
    removed = np.asarray(removed)
    if removed.size and (removed.min() < 0 or removed.max() >= size or len(np.unique(removed)) != len(removed)):
        raise ValueError(f"removed has positions outside the data set of {size} images, or one twice")
    if len(removed) >= size:
        raise ValueError(f"{len(removed)} of {size} images removed: expected at least one to be left to train on")
