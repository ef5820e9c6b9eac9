"""The influence function: dense gradients with F^-1 between them."""

import dataclasses

import jax
import numpy as np

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.scores import example_loss
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, unflatten_names
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.query import Query
from attrib_jax.methods.influence import InfluenceConfig
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.storage.files import read_arrays
from attrib_jax.storage.stage_root import StageRoot

QUERIES = [Query(prompt=prompt, seed=seed, sampler_steps=2) for prompt, seed in (("red heart", 3), ("hat", 1))]
CONFIG = InfluenceConfig(curvature="ekfac", query_draws=16, fisher_samples=32, stride=500, flips="none")


def test_scores_are_the_dense_product_with_f_inverse_between(pipeline, dataset, tmp_path):
    run = Run(pipeline, dataset, StageRoot(tmp_path))
    result, other = attribute_queries(run, QUERIES, CONFIG)
    assert result.query_loss == () and result.scores.loss_before is None
    assert run.timings["ekfac"][1] is False
    curvature = fit_curvature(run, CONFIG)
    selected, rest = run.select(CONFIG.weights)
    assert len(curvature.input_bases) == 1
    assert {name for name, _ in curvature.inputs} == flatten_names(selected).keys()

    # The damping is applied when F is solved: another one takes the stored eigenvalues.
    damped = fit_curvature(run, dataclasses.replace(CONFIG, ekfac_damping=2.0))
    jax.tree.map(np.testing.assert_array_equal, damped.eigenvalues, curvature.eigenvalues)
    assert (curvature.relative_damping, damped.relative_damping) == (0.1, 2.0)

    gradient = unflatten_names(read_arrays(result.folder / "gradient.safetensors")[0])
    direction = flatten_names(curvature.solve(gradient))
    shorter = flatten_names(damped.solve(gradient))
    assert all(0 < np.linalg.norm(shorter[name]) < 0.5 * np.linalg.norm(leaf) for name, leaf in direction.items())

    @jax.jit
    def loss_gradient(selected, rest, example):
        def loss(selected):
            timesteps = np.arange(0, 1000, 500, dtype=np.int32)
            params = merge_weights(selected, rest)
            return example_loss(run.predict, pipeline.schedule, params, loss_key(0), example, timesteps)

        return flatten_names(jax.grad(loss)(selected))

    expected = []
    for row in (0, 11, 36):
        (latents,), (text,) = run.data.inputs(row, 0, 0)
        example = Batch(latents, text, dataset.row_ids[row], np.int32(0), np.int32(0), np.float32(1))
        dense = loss_gradient(selected, rest, example)
        expected.append(sum(np.vdot(np.float64(dense[name]), np.float64(direction[name])) for name in dense))
    largest = np.abs(result.scores.score).max()
    np.testing.assert_allclose(result.scores.score[[0, 11, 36]], expected, rtol=1e-3, atol=1e-4 * largest)
    assert not np.allclose(other.scores.score, result.scores.score, rtol=0.1)

    # The direction and the gradient are those of a Newton step of unlearning, whose linearised score this is.
    shared = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG) if field.name != "method"}
    newton = UnlearnConfig(score="linear", step_size=1.0, num_examples=10**6, **shared)
    unlearned = attribute_queries(run, QUERIES[:1], newton)[0].scores.score * 10**6
    np.testing.assert_allclose(unlearned, result.scores.score, rtol=1e-2, atol=1e-3 * largest)

    # A cascade's finalists have these scores, by the gradient that is stored.
    cascade = dataclasses.replace(CONFIG, cascade=0.25, cascade_stride=1000, cascade_min=5)
    for finalists, whole in zip(attribute_queries(run, QUERIES, cascade), (result, other)):
        assert len(finalists.scores) == 10
        rows = np.searchsorted(whole.scores.row_id, finalists.scores.row_id)
        np.testing.assert_allclose(finalists.scores.score, whole.scores.score[rows], rtol=1e-3, atol=1e-5 * largest)
