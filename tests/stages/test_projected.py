"""TRAK, Journey-TRAK, D-TRAK and DAS on a tiny pipeline."""

import numpy as np
import pytest

from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.gradient_settings import PROJECTED_METHODS, GradientSettings
from attrib_jax.stages.query import Query
from attrib_jax.stages.root import StageRoot

GRADIENTS = GradientSettings(projection_dim=64)


def make_config(method, **options):
    return AttributeConfig(method=method, query_draws=32, stride=300, gradients=GRADIENTS, **options)


@pytest.fixture(scope="module")
def attributor(pipeline, dataset, tmp_path_factory):
    return Attributor(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("workdir")))


@pytest.mark.parametrize("method", PROJECTED_METHODS)
def test_smoke(attributor, dataset, method):
    result = attributor.attribute(Query(prompt="red heart", seed=3, sampler_steps=3), make_config(method))
    print(result.timings, result.scores.score[:5])
    assert np.isfinite(result.scores.score).all()
