"""The influence function, and that a tiny unlearning step scores by it (METHOD.md section 4)."""

import jax
import numpy as np

from attrib_jax.attribution import influence_scores, score_dataset, unlearn
from attrib_jax.attribution.influence import influence_matrix
from attrib_jax.attribution.unlearn import query_draws
from attrib_jax.core.keys import example_noise, loss_key, purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.curvature import Diagonal
from attrib_jax.diffusion.losses import denoising_loss
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

COUNT, DRAWS, TIMESTEPS = 40, 48, np.arange(0, 100, 25)


def strided_loss(selected, rest, example):
    params = merge_weights(selected, rest)
    noise = example_noise(loss_key(1), example["row_id"], 0, 0, TIMESTEPS, example["latents"].shape)
    arguments = example["latents"], example["text"], noise, TIMESTEPS
    return denoising_loss(predict, params, SCHEDULE, *arguments)


def loss_at_given_noise(selected, rest, example):
    """Drawn noise is float32 whatever the weights, and its last bit differs between programs; given noise is exact."""
    arguments = example["latents"], example["text"], example["noise"], TIMESTEPS
    return denoising_loss(predict, merge_weights(selected, rest), SCHEDULE, *arguments)


def flat_vector(tree):
    return np.concatenate([np.asarray(leaf).ravel() for _, leaf in sorted(flatten_names(tree).items())])


def test_tiny_newton_step_scores_by_the_influence_function():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        row_id, latents, text = tiny_denoiser.make_data(COUNT, dtype=np.float64)
        _, query_latents, query_text = tiny_denoiser.make_data(1, seed=8, dtype=np.float64)
        query_latents, query_text = query_latents[0, 0], query_text[0, 0]
        params = tiny_denoiser.init_params(dtype=np.float64)
        selected, rest = select_weights(params, "cross-attn-kv")
        curvature = Diagonal(jax.tree.map(lambda x: rng.uniform(0.1, 3, size=x.shape), selected))

        # Independently: one dense gradient an example in a Python loop, dotted in numpy.
        key = purpose_key(0, "query")
        timesteps, noise = query_draws(jax.random.fold_in(key, 0), np.arange(DRAWS), 100, query_latents.shape)

        def query_loss(selected):
            arguments = query_latents, query_text, noise.astype(np.float64), timesteps
            return denoising_loss(predict, merge_weights(selected, rest), SCHEDULE, *arguments)

        direction = flat_vector(jax.jit(jax.grad(query_loss))(selected)) / flat_vector(curvature.tree)
        gradient = jax.jit(jax.grad(strided_loss))
        examples = {"latents": latents[:, 0], "text": text[:, 0], "row_id": row_id}
        expected = np.array(
            [
                flat_vector(gradient(selected, rest, {name: x[index] for name, x in examples.items()})) @ direction
                for index in range(COUNT)
            ]
        )

        step_size, num_examples = 1e-5, 10
        moved = unlearn(
            predict, SCHEDULE, selected, rest, query_latents, query_text, key,
            draws=DRAWS, step_size=step_size, curvature=curvature, num_examples=num_examples,
        ).selected  # fmt: skip
        scores = score_dataset(
            predict, SCHEDULE, params, merge_weights(moved, rest), loss_key(1), row_id, latents, text, TIMESTEPS
        )
        assert np.corrcoef(scores.score, expected)[0, 1] > 0.999
        np.testing.assert_allclose(
            scores.score, step_size / num_examples * expected, rtol=1e-3, atol=1e-4 * abs(scores.score).max()
        )

        tree = jax.tree.map(lambda new, old: (new - old) * num_examples / step_size, moved, selected)
        mask = np.arange(COUNT) != 3
        got = jax.jit(influence_scores, static_argnums=0)(strided_loss, selected, rest, examples, tree, mask)
        np.testing.assert_allclose(got, np.where(mask, expected, 0), rtol=1e-6, atol=1e-8 * abs(expected).max())


def test_influence_of_many_queries_at_once_is_that_of_each():
    with jax.enable_x64(True):
        _, latents, text = tiny_denoiser.make_data(6, dtype=np.float64)
        selected, rest = select_weights(tiny_denoiser.init_params(dtype=np.float64), "cross-attn-kv")
        rng = np.random.default_rng(1)
        noise = rng.normal(size=(6, len(TIMESTEPS), *latents.shape[2:]))
        examples = {"latents": latents[:, 0], "text": text[:, 0], "noise": noise}
        directions = jax.tree.map(lambda leaf: rng.normal(size=(3, *leaf.shape)), selected)
        run = jax.jit(influence_matrix, static_argnums=0, static_argnames="examples_at_once")
        together = run(loss_at_given_noise, selected, rest, examples, directions)
        in_groups = run(loss_at_given_noise, selected, rest, examples, directions, examples_at_once=4)
        one = jax.jit(influence_scores, static_argnums=0)
        each = [
            one(loss_at_given_noise, selected, rest, examples, jax.tree.map(lambda leaf, q=q: leaf[q], directions))
            for q in range(3)
        ]
    np.testing.assert_allclose(together, np.stack(each, axis=1), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(in_groups, together, rtol=1e-10, atol=1e-14)
