"""The query's gradient on all devices is that of one, whatever is left of the last tile."""

import jax
import numpy as np
import pytest

from attrib_jax.attribution.unlearn import query_gradient
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import select_weights
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh


@pytest.mark.parametrize("devices", [1, 3, 4])
def test_gradients_on_all_devices_are_the_gradient_of_one(pipeline, devices):
    selected, rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    predict, key = predictor(pipeline.unet), purpose_key(0, "query")
    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 8, 4), (8, 32)))
    program, done = GradientProgram(predict, pipeline.schedule, data_mesh(jax.devices()[:devices])), []
    # 40 draws fill no whole number of tiles: the rest of the last one must count zero.
    total = program.bind(rest, latents, text, 40)(selected, key, done.append)
    run = jax.jit(query_gradient, static_argnames=("predict", "draws"))
    expected = run(predict, pipeline.schedule, selected, rest, latents, text, key, draws=40)
    assert done[-1] == 40
    np.testing.assert_allclose(total.loss / 40, expected.loss, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(total.gradient), jax.tree.leaves(expected.gradient), strict=True):
        np.testing.assert_allclose(ours / 40, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
