"""One tiny random pipeline and data set for all tests of the stages."""

import numpy as np
import pytest

from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.data.sources import ArrayDataset
from tests.tiny_pipeline import make_torch_pipeline

_WORDS = ("red heart", "grinning face", "polar bear", "hat", "flag", "keycap 10")


def make_dataset(count: int = 37, seed: int = 0) -> ArrayDataset:
    """Random 16-pixel pictures with one to three captions; the count divides by no tile."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    captions = [[f"{_WORDS[(i + j) % len(_WORDS)]} {i}" for j in range(1 + i % 3)] for i in range(count)]
    return ArrayDataset(images, captions, row_ids=np.arange(count) * 3 + 1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_torch_pipeline(str(path))
    return load_pipeline(str(path))


@pytest.fixture(scope="session")
def dataset():
    return make_dataset()
