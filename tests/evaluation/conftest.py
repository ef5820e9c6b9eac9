"""A tiny pixel model and its data set: what the evaluation retrains in seconds."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.data.sources import ArrayDataset
from attrib_jax.evaluation.counterfactual import Counterfactuals, MeasureConfig
from attrib_jax.evaluation.named import QuerySet
from attrib_jax.evaluation.retrain import Recipe, initial_params
from attrib_jax.evaluation.small_models import SmallUNet, pixel_pipeline
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.methods import method_config
from attrib_jax.models.unet import UNetConfig
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock

COUNT = 13
RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=1)


class _Attention(nn.Module):
    """Keys and values of the text, under the names that weight selection looks for."""

    @nn.compact
    def __call__(self, query, text):
        key, value = (nn.Dense(query.shape[-1], use_bias=False, name=name)(text) for name in ("to_k", "to_v"))
        return jax.nn.softmax(query @ key.swapaxes(1, 2)) @ value


class TinyDenoiser(nn.Module):
    """In a UNet's place: the same inputs and outputs, and compiled in a second instead of half a minute."""

    config: UNetConfig

    @nn.compact
    def __call__(self, latents, timestep, text):
        hidden = nn.Dense(8, name="proj_in")(latents.reshape(len(latents), -1, latents.shape[-1]))
        hidden = hidden + jnp.cos(jnp.asarray(timestep).reshape(-1, 1, 1) * jnp.logspace(-3, 0, 8))
        hidden = nn.gelu(hidden + _Attention(name="attn2")(hidden, text))
        return nn.Dense(latents.shape[-1], name="proj_out")(hidden).reshape(latents.shape)


def make_dataset():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    captions = [[f"digit {('one', 'two', 'three')[row % 3]}"] for row in range(COUNT)]
    return ArrayDataset(np.repeat(grey, 3, axis=-1), captions, row_ids=np.arange(COUNT) * 2 + 1)


def make_model():
    """With the weights that its trainings start from."""
    pipeline = pixel_pipeline(make_dataset(), SmallUNet((8,), heads=2, groups=4))
    pipeline = dataclasses.replace(pipeline, unet=TinyDenoiser(pipeline.unet.config))
    return dataclasses.replace(pipeline, params=pipeline.params | {"unet": initial_params(pipeline, 0)})


@pytest.fixture(scope="session")
def tiny_dataset():
    return make_dataset()


@pytest.fixture(scope="session")
def tiny_model():
    return make_model()


@pytest.fixture
def run(tmp_path, tiny_model, tiny_dataset):
    """The tiny model and its data in a workdir of the test's own."""
    with lock(tmp_path):
        yield Run(tiny_model, tiny_dataset, StageRoot(tmp_path))


QUERIES = tuple(Query(f"digit {word}", seed=3, guidance_scale=1.5, sampler_steps=4) for word in ("one", "two", "three"))
SET = QuerySet(QUERIES, num_tuning=1)
METHODS = {
    "random": method_config("random"),
    "unlearn": method_config(flips="none", stride=500, query_draws=8, fisher_samples=16, damping=1e-6),
}


MEASURE = MeasureConfig(stride=250)


def make_counterfactuals(run, recipe=RECIPE, measure=MEASURE, queries=QUERIES):
    prepared = [prepare_query(run.pipeline, run.predict, query) for query in queries]
    return Counterfactuals(run, queries, prepared, recipe, measure)


def files(folder):
    """Names and times of all arrays below a folder: equal where nothing was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="session")
def one_device():
    return data_mesh(jax.devices()[:1])
