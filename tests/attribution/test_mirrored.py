"""Mirrored unlearning on a tiny denoiser: its gradient against plain loops, the clamp, the stop, and the skew score."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.mirrored import (
    Limits,
    LossBatch,
    MirroredState,
    mirrored_gradient,
    mirrored_optimizer,
    mirrored_step,
    noisy_timesteps,
    shared_draw_losses,
    skew_scores,
)
from attrib_jax.attribution.residual import shared_noise
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import merge_weights, select_weights
from attrib_jax.diffusion.losses import denoising_losses
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

SHAPE = (tiny_denoiser.SIZE, tiny_denoiser.SIZE, tiny_denoiser.CHANNELS)


def draws(count: int, seed: int, length: int = tiny_denoiser.LENGTH) -> LossBatch:
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(count, length, tiny_denoiser.TEXT_WIDTH))
    latents, noise = rng.normal(size=(2, count, *SHAPE))
    return LossBatch(latents, text, rng.integers(0, 100, count).astype(np.int32), noise)


def losses_of(params, batch: LossBatch):
    """One loss after the other."""
    examples = zip(batch.latents, batch.text, batch.noise, batch.timestep)
    return [
        denoising_losses(predict, params, SCHEDULE, latents, text, noise[None], np.array([timestep]))[0]
        for latents, text, noise, timestep in examples
    ]


@pytest.mark.parametrize("length", [tiny_denoiser.LENGTH, 3])
def test_gradient_is_that_of_retained_losses_less_clamped_ones_in_float64(length):
    with jax.enable_x64(True):
        selected, rest = select_weights(tiny_denoiser.init_params(dtype=np.float64), "mlp")
        retain, forget = draws(6, 0), draws(4, 1, length)
        values = np.sort(losses_of(merge_weights(selected, rest), forget))
        clamp = (values[1] + values[2]) / 2  # two draws at the bound, two below it

        def objective(selected):
            params = merge_weights(selected, rest)
            lost = [jnp.minimum(loss, clamp) for loss in losses_of(params, forget)]
            return sum(losses_of(params, retain)) / 6 - 0.3 * sum(lost) / 4

        found = jax.jit(functools.partial(mirrored_gradient, predict, SCHEDULE))
        (kept, lost), gradient = found(selected, rest, retain, forget, clamp, 0.3)
        np.testing.assert_allclose(lost, np.minimum(values, clamp).mean(), rtol=1e-12)
        np.testing.assert_allclose(kept, np.mean(losses_of(merge_weights(selected, rest), retain)), rtol=1e-12)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
            gradient,
            jax.grad(objective)(selected),
        )
        # Draws at the bound pull no more: what is left retains.
        bounded, alone = (
            found(selected, rest, retain, forget, 0.0, 0.3)[1],
            found(selected, rest, retain, forget, 1, 0.0),
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), bounded, alone[1])


def test_steps_raise_the_forget_loss_until_the_stop_and_none_is_taken_from_there():
    selected, rest = select_weights(tiny_denoiser.init_params(), "all")
    optimizer, state = mirrored_optimizer(3e-3), None
    state = MirroredState(selected, optimizer.init(selected))
    retain, forget = (jax.tree.map(jnp.float32, draws(4, seed)) for seed in (0, 1))
    retain, forget = (part._replace(timestep=part.timestep.astype(jnp.int32)) for part in (retain, forget))
    step = jax.jit(functools.partial(mirrored_step, predict, SCHEDULE, optimizer))
    first = np.mean(losses_of(selected, forget))
    limits, losses = Limits(4 * first, 1.5 * first), []
    for _ in range(200):
        before = state
        state, taken, (_, lost) = step(rest, retain, forget, state, limits, 1.0)
        losses.append(float(lost))
        if not taken:
            break
    assert not taken and 3 < len(losses) < 200
    assert max(losses[:-1]) < 1.5 * first <= losses[-1]
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_losses_of_shared_draws_are_those_of_one_noise_for_all_examples():
    params, key, timesteps = (
        tiny_denoiser.init_params(),
        purpose_key(0, "shared draws"),
        np.array([50, 70, 70], np.int32),
    )
    row_id, latents, text = tiny_denoiser.make_data(5)
    zeros = np.zeros(5, np.int32)
    batch = Batch(latents[:, 0], text[:, 0], row_id, zeros, zeros, np.ones(5, np.float32))
    found = jax.jit(functools.partial(shared_draw_losses, predict))(SCHEDULE, params, key, batch, timesteps)
    noise = shared_noise(key, np.arange(3), SHAPE)
    for place in range(5):
        expected = denoising_losses(predict, params, SCHEDULE, latents[place, 0], text[place, 0], noise, timesteps)
        np.testing.assert_allclose(found[place], expected, rtol=1e-5)
    assert np.all(np.abs(found[:, 1] - found[:, 2]) > 1e-4)  # draws of one timestep have noise of their own


def test_the_score_is_the_mean_of_each_draws_skew():
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0.1, 1.0, (2, 3, 2, 7))
    found = skew_scores(before, after)
    for place in np.ndindex(3, 2):
        pairs = zip(before[place], after[place])
        assert found[place] == pytest.approx(sum((u - o) / (u + o + 0.001) for o, u in pairs) / 7, rel=1e-12)
    ratio = after.mean(axis=-1) - before.mean(axis=-1), after.mean(axis=-1) + before.mean(axis=-1) + 0.001
    assert np.abs(found - ratio[0] / ratio[1]).max() > 1e-3  # and not the skew of mean losses
    np.testing.assert_allclose(skew_scores(after, before), -found, rtol=1e-12)
    assert skew_scores(np.zeros(4), np.zeros(4)) == 0
    with pytest.raises(ValueError, match=r"\(3, 2, 7\) and \(2, 7\)"):
        skew_scores(before, after[0])


def test_draws_are_spread_evenly_over_the_noisiest_timesteps():
    assert noisy_timesteps(0.7, 7, 1000).tolist() == [350, 450, 550, 650, 750, 850, 950]
    assert noisy_timesteps(1.0, 1000, 1000).tolist() == list(range(1000))
    assert np.all(np.bincount(noisy_timesteps(0.5, 100, 20))[10:] == 10)
    assert noisy_timesteps(1e-9, 2, 1000).tolist() == [999, 999]
    with pytest.raises(ValueError, match="share is 0"):
        noisy_timesteps(0, 7, 1000)
    with pytest.raises(ValueError, match="draws is 0"):
        noisy_timesteps(0.7, 0, 1000)
