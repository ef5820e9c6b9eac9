"""EKFAC over a data set: against one batch of all draws, resumed, on other devices; Newton steps by it."""

import jax
import numpy as np
import pytest

from attrib_jax.attribution import score_dataset, unlearn
from attrib_jax.attribution.scores import example_loss
from attrib_jax.attribution.unlearn import query_draws
from attrib_jax.core.keys import loss_key, purpose_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights
from attrib_jax.curvature import fisher_ekfac
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.jobs.draws import Sample, fisher_draws, sample_loss
from attrib_jax.jobs.ekfac import fit_ekfac
from attrib_jax.parallel.mesh import data_mesh
from tests.failures import interrupt_states
from tests.jobs.tiny_problem import CHANNELS, LENGTH, SCHEDULE, SIZE, WIDTH, predict, tiny_problem

# The second is more than two states apart on one device.
SAMPLES, LONG = 43, 1100


@pytest.fixture
def problem():
    with tiny_problem() as problem:
        yield problem


def fit(problem, path, devices, samples=SAMPLES):
    selected, rest, data = problem
    path.mkdir(exist_ok=True)
    mesh = data_mesh(jax.devices()[:devices])
    return fit_ekfac(path, predict, SCHEDULE, selected, rest, data, samples, 0, mesh=mesh)


def assert_solves_alike(curvature, other, vector):
    solved, expected = flatten_names(curvature.solve(vector)), flatten_names(other.solve(vector))
    for name, leaf in expected.items():
        np.testing.assert_allclose(solved[name], leaf, rtol=1e-6, atol=1e-9 * np.abs(leaf).max())


def test_the_stage_fits_what_one_batch_of_all_draws_does(problem, tmp_path):
    selected, rest, data = problem
    curvature = fit(problem, tmp_path, 2)
    draws = fisher_draws(0, SAMPLES, data.num_captions, 100)
    batch = Sample(*data.inputs(draws.row, draws.flip, draws.caption), draws.index, draws.timestep, np.ones(SAMPLES))
    expected = fisher_ekfac(sample_loss(predict, SCHEDULE, purpose_key(0, "fisher")), selected, rest, batch)
    assert_solves_alike(curvature, expected, selected)


def test_interrupted_fits_resume_to_the_same_bits_and_other_devices_are_close(problem, tmp_path, monkeypatch):
    whole = fit(problem, tmp_path / "whole", 1, LONG)
    assert_solves_alike(fit(problem, tmp_path / "others", 2, LONG), whole, problem[0])
    interrupt_states(monkeypatch, after=(2, 5))
    # Amid the factors, and amid the eigenvalues.
    for left in ("factors", "partial"):
        with pytest.raises(KeyboardInterrupt):
            fit(problem, tmp_path / "resumed", 1, LONG)
        assert (tmp_path / "resumed" / left).is_dir()
    jax.tree.map(np.testing.assert_array_equal, whole, fit(problem, tmp_path / "resumed", 1, LONG))
    assert {path.name for path in (tmp_path / "resumed").iterdir()} == {"bases.safetensors", "eigenvalues.safetensors"}
    bases = tmp_path / "resumed" / "bases.safetensors"
    bases.write_bytes(bases.read_bytes()[:-1])
    jax.tree.map(np.testing.assert_array_equal, whole, fit(problem, tmp_path / "resumed", 1, LONG))


def test_small_newton_steps_score_by_the_influence_function(problem, tmp_path):
    """Unlearning scores over alpha / N, for a small alpha, against dense gradients with F^-1 between them."""
    selected, rest, data = problem
    curvature = fit(problem, tmp_path, 2)
    key, timesteps, draws = purpose_key(0, "query"), np.arange(0, 100, 25), 24
    latents, text = np.ones((SIZE, SIZE, CHANNELS)), np.ones((LENGTH, WIDTH))

    def query_loss(selected):
        params = merge_weights(selected, rest)
        steps, noise = query_draws(jax.random.fold_in(key, 0), np.arange(draws), 100, latents.shape)
        return denoising_loss(predict, params, SCHEDULE, latents, text, noise.astype(np.float64), steps)

    def loss(selected, latents, text, row_id):
        example = Batch(latents, text, row_id, np.int32(0), np.int32(0), np.float32(1))
        return example_loss(predict, SCHEDULE, merge_weights(selected, rest), loss_key(1), example, timesteps)

    direction = curvature.solve(jax.jit(jax.grad(query_loss))(selected))
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))(
        selected, data.latents[:, 0], data.text, data.row_ids
    )
    products = jax.tree.map(lambda g, d: np.einsum("nio,io->n", g, d), gradients, direction)
    expected = sum(jax.tree.leaves(products))

    step_size, num_examples = 1e-7, 10
    moved = unlearn(
        predict, SCHEDULE, selected, rest, latents, text, key,
        draws=draws, step_size=step_size, curvature=curvature, num_examples=num_examples,
    ).selected  # fmt: skip
    before, after = merge_weights(selected, rest), merge_weights(moved, rest)
    fixed = (loss_key(1), data.row_ids, data.latents[:, :1], data.text[:, None], timesteps)
    scores = score_dataset(predict, SCHEDULE, before, after, *fixed).score * num_examples / step_size
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
