"""Scores: strided losses against a plain loop, flips and captions, and bit-equality in any order, subset and batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution import combine_flips, combine_scores, score_dataset, strided_losses
from attrib_jax.attribution.scores import dataset_losses
from attrib_jax.core.keys import example_noise, loss_key
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


@pytest.mark.parametrize("forwards", [6, 2, 1])
def test_latents_too_large_to_be_taken_at_once_give_the_same(monkeypatch, forwards):
    """Two examples of three timesteps at a time; one, two timesteps at a time; and one timestep."""
    params = tiny_denoiser.init_params()
    row_id, latents, text = tiny_denoiser.make_data(4)
    zeros = np.zeros(4, np.int32)
    batch = Batch(latents[:, 0], text[:, 0], np.asarray(row_id, np.int32), zeros, zeros, np.ones(4, np.float32))

    def losses_and_gradient():
        def total(params):
            losses = strided_losses(predict, SCHEDULE, params, KEY, batch, TIMESTEPS)
            return jnp.sum(losses), losses

        return jax.jit(jax.grad(total, has_aux=True))(params)

    expected = losses_and_gradient()
    pixels = forwards * latents[0, 0, ..., 0].size
    monkeypatch.setattr("attrib_jax.attribution.scores.forward_pixels", lambda platform: pixels)
    monkeypatch.setattr("attrib_jax.diffusion.losses.FORWARD_PIXELS", pixels)
    found = losses_and_gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_combining_flips():
    before = np.array([[1.0, 2.0], [3.0, 3.0], [0.5, 0.5]])
    after = before + np.array([[0.1, 0.4], [-0.2, -0.3], [0.2, 0.2]])
    for how, expected, flip in (
        ("max", [0.4, -0.2, 0.2], [1, 0, 0]),
        ("mean", [0.25, -0.25, 0.2], [1, 0, 0]),
        ("none", [0.1, -0.2, 0.2], [0, 0, 0]),
    ):
        score, winner = combine_scores(before, after, how)
        np.testing.assert_allclose(score, expected, atol=1e-12)
        assert winner.tolist() == flip
    with pytest.raises(ValueError, match="unknown flips 'maximum'"):
        combine_scores(before, after, "maximum")
    with pytest.raises(ValueError, match="expected the same"):
        combine_scores(before, after[:2])
    with pytest.raises(ValueError, match=r"values has shape \(3,\); expected \(N, flips\)"):
        combine_flips(after[:, 0])


def test_numbers_of_flips_become_scores_as_differences_do():
    values = np.array([[1.0, 3.0], [2.0, -5.0]])
    for how, expected, winner in (("max", [3, 2], [1, 0]), ("mean", [2, -1.5], [1, 0]), ("none", [1, 2], [0, 0])):
        score, flip = combine_flips(values, how)
        np.testing.assert_array_equal(score, expected)
        np.testing.assert_array_equal(flip, winner)
    with pytest.raises(ValueError, match="flips"):
        combine_flips(values, "both")


def test_captions_are_averaged_and_padded_ones_left_out():
    params = tiny_denoiser.init_params()
    row_id, latents, text = tiny_denoiser.make_data(5, flips=2, captions=3)
    caption_mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
    run = functools.partial(dataset_losses, predict, SCHEDULE, params, KEY, row_id, latents)
    spoilt = np.where(caption_mask[:, :, None, None] > 0, text, np.nan)
    got = run(spoilt, TIMESTEPS, caption_mask=caption_mask)
    single = []
    for caption in range(3):
        # Alone, with the other captions masked out: the loss of this (picture, flip, caption).
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
    ("changed", "error", "message"),
    [
        ({"how": "maximum"}, ValueError, "unknown how 'maximum'"),
        ({"loss_before": np.zeros((4, 2))}, ValueError, r"loss_before has shape \(4, 2\).*\(5, 2\)"),
        ({"timesteps": np.arange(0, 1000, 50)}, ValueError, "timesteps run from 0 to 950; expected 0 to 99"),
        ({"timesteps": np.array([-1])}, ValueError, "timesteps run from -1"),
        ({"timesteps": np.array([], np.int32)}, ValueError, "one or more integers"),
        ({"latents": lambda x: x[:, 0]}, ValueError, r"latents has shape .*\(N, flips, h, w, c\)"),
        ({"text": lambda x: x[:, 0]}, ValueError, r"text has shape .*\(N, captions, L, d\)"),
        ({"text": lambda x: x[:4]}, ValueError, "latents has 5 rows and text 4"),
        ({"row_id": lambda x: x[:4]}, ValueError, r"row_id has shape \(4,\)"),
        ({"row_id": np.arange(5) + 2**32}, ValueError, "row_id is 4294967296"),
        ({"row_id": np.arange(5) - 1}, ValueError, "row_id is -1"),
        ({"row_id": np.arange(5) + 0.2}, TypeError, "row_id has dtype float64"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_loss(changed, error, message):
    params = tiny_denoiser.init_params()
    row_id, latents, text = tiny_denoiser.make_data(5, flips=2)
    arguments = {"row_id": row_id, "latents": latents, "text": text, "timesteps": TIMESTEPS}
    for name, value in changed.items():
        arguments[name] = value(arguments[name]) if callable(value) else value

    def never(done):
        raise AssertionError("a loss was computed")

    with pytest.raises(error, match=message):
        score_dataset(predict, SCHEDULE, params, params, KEY, **arguments, progress=never)


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
