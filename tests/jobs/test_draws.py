"""Gradients of a batch of draws are those of each draw's loss, whichever weights are selected."""

import jax
import numpy as np
import pytest

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import select_weights
from attrib_jax.curvature.fisher import TokenProduct
from attrib_jax.jobs.draws import Sample, sample_gradients, sample_loss
from attrib_jax.models.predictor import predictor

jnp = jax.numpy


def dense(gradients):
    """The gradients with their products multiplied out."""
    return jax.tree.map(
        lambda leaf: leaf.columns @ leaf.cotangents if isinstance(leaf, TokenProduct) else leaf,
        gradients,
        is_leaf=lambda leaf: isinstance(leaf, TokenProduct),
    )


@pytest.mark.parametrize("subset", ["cross-attn-kv", "cross-attn"])
def test_gradients_of_a_batch_are_those_of_its_samples(pipeline, subset):
    rng = np.random.default_rng(0)
    samples = Sample(
        latents=rng.normal(size=(3, 8, 8, 4)),
        text=rng.normal(size=(3, 8, 32)),
        index=np.array([4, 0, 7], np.int32),
        timestep=np.array([900, 3, 500], np.int32),
        mask=np.ones(3),
    )
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pipeline.params["unet"])
        selected, rest = select_weights(params, subset)
        model = predictor(pipeline.unet), pipeline.schedule, purpose_key(0, "fisher")
        columns = np.swapaxes(samples.text, 1, 2)
        found = jax.jit(sample_gradients(*model))(selected, rest, (samples, columns))
        factored = jax.jit(sample_gradients(*model, factored=True))(selected, rest, (samples, columns))
        multiplied = dense(factored)
        each = jax.vmap(jax.grad(sample_loss(*model)), (None, None, 0))
        expected = jax.jit(each)(selected, rest, samples)
    assert sum(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(factored)) > len(jax.tree.leaves(found))
    for gradients in (found, multiplied):
        assert jax.tree.structure(gradients) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
            # The noise is float32.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * np.abs(other).max())
