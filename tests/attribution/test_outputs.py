"""Gradients of the outputs against jacobians written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.outputs import OUTPUTS, output_gradient, output_gradients
from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.models.predictor import predictor
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

KEY, TIMESTEPS = loss_key(1), np.array([0, 30, 90], np.int32)


def flat_vector(tree):
    return np.concatenate([np.asarray(leaf).ravel() for _, leaf in sorted(flatten_names(tree).items())])


def dense_jacobian(selected, rest, example, reduce):
    """(S, weights), timestep by timestep."""
    noise = example_noise(KEY, example.row_id, example.flip, example.caption, TIMESTEPS, example.latents.shape)
    alphas = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[TIMESTEPS]
    rows = []
    for each, alpha, timestep in zip(np.asarray(noise, np.float64), alphas, TIMESTEPS):
        noisy = np.sqrt(alpha) * example.latents + np.sqrt(1 - alpha) * each

        def value(selected, noisy=noisy, each=each, timestep=timestep):
            return reduce(predict(merge_weights(selected, rest), noisy, timestep, example.text), each)

        rows.append(flat_vector(jax.grad(value)(selected)))
    return np.stack(rows)


REDUCTIONS = {
    "loss": lambda prediction, noise: jnp.mean((prediction - noise) ** 2),
    "square": lambda prediction, noise: jnp.mean(prediction**2),
    "mean": lambda prediction, noise: jnp.mean(prediction),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_equals_the_jacobian(output):
    with jax.enable_x64(True):
        row_id, latents, text = tiny_denoiser.make_data(1, flips=2, dtype=np.float64)
        selected, rest = select_weights(tiny_denoiser.init_params(dtype=np.float64), "cross-attn-kv")
        example = Batch(latents[0, 1], text[0, 0], row_id[0], 1, 0, 1.0)

        def merge(selected):
            return merge_weights(selected, rest)

        run = jax.jit(output_gradient, static_argnums=(0, 1, 3))
        gradient, residual = run(output, predict, SCHEDULE, merge, selected, KEY, example, TIMESTEPS)
        jacobian = dense_jacobian(selected, rest, example, REDUCTIONS[output])
        if output == "mean":
            jacobian /= np.linalg.norm(jacobian, axis=1, keepdims=True)
        expected = jacobian.mean(axis=0)
        np.testing.assert_allclose(flat_vector(gradient), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())
        if output != "mean":
            assert float(residual) == 0
            return
        noise = np.asarray(example_noise(KEY, row_id[0], 1, 0, TIMESTEPS, example.latents.shape), np.float64)
        noisy = SCHEDULE.add_noise(example.latents, noise, TIMESTEPS)
        params = merge_weights(selected, rest)
        errors = [predict(params, x, t, example.text) - e for x, t, e in zip(noisy, TIMESTEPS, noise)]
        np.testing.assert_allclose(residual, np.mean([np.sqrt(np.mean(error**2)) for error in errors]), rtol=1e-6)


def test_a_gradient_of_zero_stays_zero():
    row_id, latents, text = tiny_denoiser.make_data(1)
    example = Batch(latents[0, 0], text[0, 0], row_id[0], 0, 0, 1.0)

    def constant(params, noisy_latents, timestep, text):
        return jnp.ones_like(noisy_latents) + 0 * params["w"]

    run = jax.jit(output_gradient, static_argnums=(0, 1, 3))
    gradient, residual = run(
        "mean", constant, SCHEDULE, lambda tree: tree, {"w": jnp.float32(2)}, KEY, example, TIMESTEPS
    )
    assert float(gradient["w"]) == 0 and float(residual) > 0
    with pytest.raises(ValueError, match="unknown output 'los'"):
        output_gradient("los", constant, SCHEDULE, None, {}, KEY, example, TIMESTEPS)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("weights", ["cross-attn-kv", "cross-attn"])
def test_gradients_of_a_group_are_those_of_each_example(pipeline, output, weights):
    """By the text's projections where all selected weights project it, by `vmap` otherwise."""
    rng, module, timesteps = np.random.default_rng(0), pipeline.unet, np.array([100, 700], np.int32)
    shape = (8, 8, pipeline.unet.config.in_channels)
    text = rng.normal(size=(3, 8, module.config.cross_attention_dim)).astype(np.float32)
    numbers = np.int32([4, 9, 2]), np.int32([0, 1, 0]), np.int32([0, 0, 2])
    batch = Batch(rng.normal(size=(3, *shape)).astype(np.float32), text, *numbers, np.ones(3, np.float32))
    selected, rest = select_weights(pipeline.params["unet"], weights)
    predict = predictor(module)

    @jax.jit
    def both(selected, rest, batch):
        arguments = output, predict, pipeline.schedule, lambda tree: merge_weights(tree, rest), selected
        together = output_gradients(*arguments, rest, KEY, batch, timesteps)
        return together, jax.lax.map(lambda each: output_gradient(*arguments, KEY, each, timesteps), batch)

    (gradients, residuals), (expected, alone) = both(selected, rest, batch)
    for name, leaf in flatten_names(expected).items():
        scale = np.abs(leaf).max(axis=(1, 2), keepdims=True) if leaf.ndim == 3 else np.abs(leaf).max()
        np.testing.assert_allclose(flatten_names(gradients)[name] / scale, leaf / scale, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(residuals, alone, rtol=1e-5)
