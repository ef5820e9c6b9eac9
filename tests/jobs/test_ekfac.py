"""EKFAC over a data set: against one batch of all draws, resumed, on other devices; unlearning and influence by it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attrib_jax.jobs.draws as draws_stage
from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution import score_dataset, unlearn
from attrib_jax.attribution.scores import example_loss
from attrib_jax.attribution.unlearn import query_draws
from attrib_jax.core.keys import loss_key, purpose_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.curvature import fisher_ekfac
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.draws import Sample, fisher_draws, sample_loss
from attrib_jax.jobs.ekfac import fit_ekfac
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.models.projected_text import ProjectedText
from attrib_jax.models.unet import Attention
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.files import read_arrays
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.state import StateStore

QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
INFLUENCE = method_config(
    method="influence", curvature="ekfac", query_draws=16, fisher_samples=32, stride=500, flips="none"
)
SAMPLES, COUNT, SIZE, CHANNELS, LENGTH, WIDTH = 43, 11, 2, 3, 4, 6
SCHEDULE = NoiseSchedule.from_config({"num_train_timesteps": 100})


class Tiny(nn.Module):
    """A denoiser of (SIZE, SIZE, CHANNELS) with one cross-attention layer."""

    @nn.compact
    def __call__(self, latents, timestep, text):
        pixels = latents.reshape(1, -1, CHANNELS)
        time = jnp.broadcast_to(timestep / 100, (*pixels.shape[:2], 1)).astype(pixels.dtype)
        hidden = nn.Dense(WIDTH, name="conv_in")(jnp.concatenate([pixels, time], axis=-1))
        hidden = hidden + Attention(2, name="attn2")(hidden, ProjectedText(text[None], {}))
        return nn.Dense(CHANNELS, name="conv_out")(jnp.tanh(hidden)).reshape(latents.shape)


def predict(params, noisy_latents, timestep, text):
    return Tiny().apply({"params": params}, noisy_latents, timestep, text)


@pytest.fixture
def problem():
    """Weights in two halves and an encoded data set, and float64 while it is in use."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        data = EncodedDataset(
            row_ids=np.arange(COUNT, dtype=np.int32),
            latents=rng.normal(size=(COUNT, 2, SIZE, SIZE, CHANNELS)).astype(np.float32),
            text=rng.normal(size=(COUNT, LENGTH, WIDTH)).astype(np.float32),
            first_caption=np.arange(COUNT + 1),
        )
        shapes = jax.eval_shape(Tiny().init, jax.random.key(0), data.latents[0, 0], 0, data.text[0])["params"]
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 2, shapes)
        yield *select_weights(params, "cross-attn-kv"), data


def fit(problem, path, devices):
    selected, rest, data = problem
    path.mkdir(exist_ok=True)
    mesh = data_mesh(jax.devices()[:devices])
    return fit_ekfac(path, predict, SCHEDULE, selected, rest, data, SAMPLES, 0, mesh=mesh)


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


def test_killed_fits_resume_to_the_same_bits_and_other_devices_are_close(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(draws_stage, "_SAMPLES_PER_CPU", 8)
    monkeypatch.setattr(draws_stage, "tiles_per_checkpoint", lambda mesh: 1)
    whole = fit(problem, tmp_path / "whole", 2)
    assert_solves_alike(fit(problem, tmp_path / "others", 4), whole, problem[0])
    write, count = StateStore.write, 0

    def failing(self, tree, progress):
        nonlocal count
        count += 1
        write(self, tree, progress)
        # Amid the factors, and amid the eigenvalues.
        if count in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(StateStore, "write", failing)
    for left in ("factors", "partial"):
        with pytest.raises(KeyboardInterrupt):
            fit(problem, tmp_path / "resumed", 2)
        assert (tmp_path / "resumed" / left).is_dir()
    resumed = fit(problem, tmp_path / "resumed", 2)
    assert count == 6
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert {path.name for path in (tmp_path / "resumed").iterdir()} == {"bases.safetensors", "eigenvalues.safetensors"}
    bases = tmp_path / "resumed" / "bases.safetensors"
    bases.write_bytes(bases.read_bytes()[:-1])
    jax.tree.map(np.testing.assert_array_equal, whole, fit(problem, tmp_path / "resumed", 2))


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


def test_influence_is_the_dense_product_with_f_inverse_between(pipeline, dataset, tmp_path):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path))
    result, other = attribute_queries(attributor, [QUERY, Query(prompt="hat", seed=1, sampler_steps=2)], INFLUENCE)
    assert result.query_loss == () and result.scores.loss_before is None
    assert attributor.timings["ekfac"][1] is False
    curvature = attributor.curvature(INFLUENCE)
    selected, rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    assert len(curvature.input_bases) == 1
    assert {name for name, _ in curvature.inputs} == flatten_names(selected).keys()

    gradient = unflatten_names(read_arrays(result.folder / "gradient.safetensors")[0])
    direction = flatten_names(curvature.solve(gradient))

    @jax.jit
    def loss_gradient(selected, rest, example):
        def loss(selected):
            timesteps = np.arange(0, 1000, 500, dtype=np.int32)
            params = merge_weights(selected, rest)
            return example_loss(attributor.predict, pipeline.schedule, params, loss_key(0), example, timesteps)

        return flatten_names(jax.grad(loss)(selected))

    expected = []
    for row in (0, 11, 36):
        (latents,), (text,) = attributor.data.inputs(row, 0, 0)
        example = Batch(latents, text, dataset.row_ids[row], np.int32(0), np.int32(0), np.float32(1))
        dense = loss_gradient(selected, rest, example)
        expected.append(sum(np.vdot(np.float64(dense[name]), np.float64(direction[name])) for name in dense))
    largest = np.abs(result.scores.score).max()
    np.testing.assert_allclose(result.scores.score[[0, 11, 36]], expected, rtol=1e-3, atol=1e-4 * largest)
    assert not np.allclose(other.scores.score, result.scores.score, rtol=0.1)

    # The direction and the gradient are those of a Newton step of unlearning, whose linearised score this is.
    config = dataclasses.replace(INFLUENCE, method="unlearn", score="linear", step_size=1.0, num_examples=10**6)
    unlearned = attributor.attribute(QUERY, config).scores.score * 10**6
    np.testing.assert_allclose(unlearned, result.scores.score, rtol=1e-2, atol=1e-3 * largest)


def test_settings_and_refusals():
    plain = method_config().settings()
    assert "curvature" not in plain and "ekfac_damping" not in plain
    settings = method_config(curvature="ekfac").settings()
    assert settings["curvature"] == "ekfac" and settings["ekfac_damping"] == 0.1
    for arguments, message in (
        ({"curvature": "kfac"}, "unknown curvature 'kfac': did you mean 'ekfac'"),
        ({"curvature": "ekfac", "update": "sgd"}, "ekfac' belongs to update='newton'"),
        ({"curvature": "ekfac", "fisher": "somewhere.pt"}, "holds a diagonal F"),
        ({"ekfac_damping": 0.2}, "ekfac_damping is 0.2 but curvature 'diagonal'"),
        ({"curvature": "ekfac", "ekfac_damping": -1.0}, "ekfac_damping is -1"),
        ({"method": "influence", "update": "sgd"}, "one Newton step"),
        ({"method": "influence", "steps": 2}, "steps 2"),
    ):
        with pytest.raises(ValueError, match=message):
            method_config(**arguments)
