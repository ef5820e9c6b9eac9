"""A tiny pixel model and its data set: what the evaluation retrains in seconds."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.data.sources import ArrayDataset
from attrib_jax.evaluation.retrain import Recipe, initial_params
from attrib_jax.evaluation.small_models import SmallUNet, pixel_pipeline
from attrib_jax.runtime.mesh import data_mesh
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.root import StageRoot

COUNT = 13
RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=1)


@pytest.fixture(scope="session")
def tiny_dataset():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    captions = [[f"digit {('one', 'two', 'three')[row % 3]}"] for row in range(COUNT)]
    return ArrayDataset(np.repeat(grey, 3, axis=-1), captions, row_ids=np.arange(COUNT) * 2 + 1)


@pytest.fixture(scope="session")
def untrained(tiny_dataset):
    return pixel_pipeline(tiny_dataset, SmallUNet((8,), heads=2, groups=4))


@pytest.fixture(scope="session")
def tiny_model(untrained):
    """With the weights that its trainings start from."""
    return dataclasses.replace(untrained, params=untrained.params | {"unet": initial_params(untrained, 0)})


@pytest.fixture
def attributor(tmp_path, tiny_model, tiny_dataset):
    with lock(tmp_path):
        yield Attributor(tiny_model, tiny_dataset, StageRoot(tmp_path))


@pytest.fixture(scope="session")
def one_device():
    return data_mesh(jax.devices()[:1])
