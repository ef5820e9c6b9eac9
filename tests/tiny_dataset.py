"""A data set of random pictures for the tiny pipeline."""

import numpy as np

from attrib_jax.data.sources import ArrayDataset

_WORDS = ("red heart", "grinning face", "polar bear", "hat", "flag", "keycap 10")


def make_dataset(count: int = 37, seed: int = 0) -> ArrayDataset:
    """Random 16-pixel pictures with one to three captions; the count divides by no tile."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    captions = [[f"{_WORDS[(i + j) % len(_WORDS)]} {i}" for j in range(1 + i % 3)] for i in range(count)]
    return ArrayDataset(images, captions, row_ids=np.arange(count) * 3 + 1)
