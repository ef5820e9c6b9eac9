"""Scores: strided losses against a plain loop, flips and captions, and bit-equality in any order, subset and batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution import combine_flips, combine_scores, score_dataset, strided_losses
from attrib_jax.attribution.scores import dataset_losses
from attrib_jax.core.keys import example_noise, loss_key, shared_noise, shared_noise_key
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

KEY = loss_key(3)
TIMESTEPS = np.arange(0, 100, 40, dtype=np.int32)


def test_strided_loss_is_the_mean_over_timesteps_of_each_examples_own_noise():
    params = tiny_denoiser.init_params()
    _, latents, text = tiny_denoiser.make_data(4, flips=2, captions=3)
    row_id, flip, caption = np.int32([11, 2, 2, 7]), np.int32([0, 1, 0, 1]), np.int32([2, 0, 0, 1])
    index = np.arange(4)
    batch = Batch(latents[index, flip], text[index, caption], row_id, flip, caption, np.float32([1, 1, 0, 1]))
    batch.latents[2] = np.nan
    losses = jax.jit(strided_losses, static_argnums=0)(predict, SCHEDULE, params, KEY, batch, TIMESTEPS)
    assert losses[2] == 0
    reference = jax.jit(denoising_losses, static_argnums=0)
    for i in (0, 1, 3):
        noise = example_noise(KEY, row_id[i], flip[i], caption[i], TIMESTEPS, latents.shape[2:])
        arguments = batch.latents[i], batch.text[i], noise, TIMESTEPS
        expected = np.asarray(reference(predict, params, SCHEDULE, *arguments), np.float64).mean()
        np.testing.assert_allclose(losses[i], expected, rtol=1e-5)


def test_shared_noise_is_that_of_the_timestep_whatever_the_example():
    params, key = tiny_denoiser.init_params(), shared_noise_key(3)
    _, latents, text = tiny_denoiser.make_data(3)
    row_id, flip, zeros = np.int32([11, 2, 5]), np.int32([0, 1, 0]), np.zeros(3, np.int32)
    batch = Batch(latents[:, 0], text[:, 0], row_id, flip, zeros, np.ones(3, np.float32))
    losses = jax.jit(functools.partial(strided_losses, predict, shared=True))(SCHEDULE, params, key, batch, TIMESTEPS)
    noise = shared_noise(key, TIMESTEPS, latents.shape[2:])
    for i in range(3):
        arguments = batch.latents[i], batch.text[i], noise, TIMESTEPS
        expected = denoising_losses(predict, params, SCHEDULE, *arguments)
        np.testing.assert_allclose(losses[i], np.asarray(expected, np.float64).mean(), rtol=1e-5)


def scaled(params, noisy, timestep, text):
    """A denoiser of large latents that costs little."""
    return jnp.tanh(noisy * params["w"]) + jnp.mean(text) + timestep / 100


@pytest.mark.parametrize("side", [32, 64, 256, 400])
def test_latents_too_large_to_be_taken_at_once_give_the_same(side):
    """Two examples of three timesteps at a time; one; one, two timesteps at a time; and one timestep."""
    rng, zeros = np.random.default_rng(0), np.zeros(4, np.int32)
    latents, text = rng.normal(size=(4, side, side, 2)).astype(np.float32), rng.normal(size=(4, 3, 2))
    batch = Batch(latents, text.astype(np.float32), np.arange(4, dtype=np.int32), zeros, zeros, np.ones(4, np.float32))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, batch, timesteps):
        losses = strided_losses(scaled, SCHEDULE, params, KEY, batch, timesteps)
        return jnp.sum(losses), losses

    params = {"w": jnp.ones(2)}
    slopes, losses = gradient(params, batch, TIMESTEPS)
    alone = [gradient(params, Batch(*(x[i : i + 1] for x in batch)), t[None]) for i in range(4) for t in TIMESTEPS]
    np.testing.assert_allclose(losses, np.reshape([loss for _, loss in alone], (4, 3)).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(slopes["w"], np.sum([slope["w"] for slope, _ in alone], axis=0) / 3, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "expected", "winners"),
    [
        ("max", [0.4, -0.2, 0.2], [1, 0, 0]),
        ("mean", [0.25, -0.25, 0.2], [1, 0, 0]),
        ("none", [0.1, -0.2, 0.2], [0] * 3),
    ],
)
def test_combining_flips(how, expected, winners):
    before, values = np.array([[1.0, 2.0], [3.0, 3.0], [0.5, 0.5]]), np.array([[0.1, 0.4], [-0.2, -0.3], [0.2, 0.2]])
    for score, winner in (combine_scores(before, before + values, how), combine_flips(values, how)):
        np.testing.assert_allclose(score, expected, atol=1e-12)
        assert winner.tolist() == winners


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: combine_scores(x, x, "maximum"), "flips 'maximum'"),
        (lambda x: combine_flips(x, "both"), "flips 'both'"),
        (lambda x: combine_scores(x, x[:2]), r"\(3, 2\).*\(2, 2\)"),
        (lambda x: combine_flips(x[:, 0]), r"values has shape \(3,\)"),
    ],
)
def test_flips_that_cannot_be_combined_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call(np.ones((3, 2)))


def test_captions_are_averaged_and_padded_ones_left_out():
    params = tiny_denoiser.init_params()
    row_id, latents, text = tiny_denoiser.make_data(5, flips=2, captions=3)
    caption_mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
    run = functools.partial(dataset_losses, predict, SCHEDULE, params, KEY, row_id, latents)
    spoilt = np.where(caption_mask[:, :, None, None] > 0, text, np.nan)
    got = run(spoilt, TIMESTEPS, caption_mask=caption_mask)
    single = []
    for caption in range(3):
        # Alone, with the other captions masked out: the loss of this (image, flip, caption).
        only = np.arange(3)[None] == caption
        single.append(run(text, TIMESTEPS, caption_mask=np.repeat(only, 5, axis=0)))
    single = np.stack(single, axis=-1)
    expected = (single * caption_mask[:, None]).sum(axis=-1) / caption_mask.sum(axis=1)[:, None]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="caption for every image"):
        run(text, TIMESTEPS, caption_mask=np.zeros((5, 3)))


def test_score_dataset_reuses_the_losses_before():
    before = tiny_denoiser.init_params()
    after = jax.tree.map(lambda leaf: leaf + 0.01, before)
    row_id, latents, text = tiny_denoiser.make_data(5, flips=2)
    run = functools.partial(score_dataset, predict, SCHEDULE, before, after, KEY, row_id, latents, text, TIMESTEPS)
    done = []
    full = run(progress=done.append)
    # Two passes, before and after; each reports up to its 5 x 2 examples.
    assert done == 2 * done[: len(done) // 2] and done[-1] == 10
    assert full.loss_before.shape == full.loss_after.shape == (5, 2)
    np.testing.assert_array_equal(full.score, (full.loss_after - full.loss_before).max(axis=1))
    again = run(loss_before=full.loss_before)
    np.testing.assert_array_equal(again.score, full.score)
    unflipped = run(loss_before=full.loss_before, how="none")
    np.testing.assert_array_equal(unflipped.score, (full.loss_after - full.loss_before)[:, 0])
    assert unflipped.loss_before.shape == unflipped.loss_after.shape == (5, 1)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"how": "maximum"}, "'maximum'"),
        ({"loss_before": np.zeros((4, 2))}, r"loss_before .*\(4, 2\).*\(5, 2\)"),
        ({"timesteps": np.arange(0, 1000, 50)}, "timesteps .* 950.* 99"),
        ({"timesteps": np.array([-1])}, "timesteps .* -1"),
        ({"timesteps": np.array([], np.int32)}, "timesteps"),
        ({"latents": lambda x: x[:, 0]}, r"latents .*\(N, flips, h, w, c\)"),
        ({"text": lambda x: x[:, 0]}, r"text .*\(N, captions, L, d\)"),
        ({"text": lambda x: x[:4]}, "latents .* 5 .*text 4"),
        ({"row_id": lambda x: x[:4]}, r"row_id .*\(4,\)"),
        ({"row_id": np.arange(5) + 2**32}, "row_id is 4294967296"),
        ({"row_id": np.arange(5) - 1}, "row_id is -1"),
        ({"row_id": np.arange(5) + 0.2}, "row_id .*float64"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_loss(changed, named):
    params = tiny_denoiser.init_params()
    row_id, latents, text = tiny_denoiser.make_data(5, flips=2)
    arguments = {"row_id": row_id, "latents": latents, "text": text, "timesteps": TIMESTEPS}
    for name, value in changed.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    done = []
    with pytest.raises((ValueError, TypeError), match=named):
        score_dataset(predict, SCHEDULE, params, params, KEY, **arguments, progress=done.append)
    assert not done


def small_unet():
    config = UNetConfig(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=tiny_denoiser.TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        in_channels=tiny_denoiser.CHANNELS,
        out_channels=tiny_denoiser.CHANNELS,
    )
    unet = UNet2DConditionModel(config)
    inputs = jnp.zeros((1, 4, 4, 2)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 5, tiny_denoiser.TEXT_WIDTH))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    return predictor(unet), jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)


def test_losses_are_equal_to_the_bit_in_any_order_subset_and_batch_size():
    """On the real UNet, whose convolutions and matrix products XLA blocks by the shape of the batch."""
    model, params = small_unet()
    _, latents, text = tiny_denoiser.make_data(21, flips=2, captions=2)
    row_id = np.random.default_rng(1).permutation(1000)[:21]
    schedule = NoiseSchedule.from_config({})

    def run(rows, **options):
        timesteps = np.int32([0, 500])
        return dataset_losses(
            model, schedule, params, KEY, row_id[rows], latents[rows], text[rows], timesteps, **options
        )

    everything = np.arange(21)
    losses = run(everything)
    assert len(np.unique(losses)) == losses.size
    shuffled = np.random.default_rng(2).permutation(21)
    np.testing.assert_array_equal(run(shuffled, batch_size=1), losses[shuffled])
    np.testing.assert_array_equal(run(everything, batch_size=40), losses)
    for part in (shuffled[:5], everything[20:], everything[3:12]):
        np.testing.assert_array_equal(run(part, batch_size=100), losses[part])
