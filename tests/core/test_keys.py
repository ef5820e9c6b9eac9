"""The noise rule: a pure function of (seed, row id, flip, caption, timestep), to the bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.keys import example_noise, loss_key, purpose_key

SHAPE = (3, 5, 3)
TIMESTEPS = np.arange(0, 1000, 100)
# The first four bytes of sha256("fisher"), 0x827961b4, with the top bit set: fixed, for reproducible draws.
FISHER_FOLD = 0x827961B4


def test_one_timestep_does_not_depend_on_the_others():
    key = loss_key(7)
    full = np.asarray(example_noise(key, 12, 1, 3, TIMESTEPS, SHAPE))
    assert full.shape == (10, *SHAPE) and full.dtype == np.float32
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_array_equal(example_noise(key, 12, 1, 3, TIMESTEPS[order], SHAPE), full[order])
    for i in (0, 4, 9):
        np.testing.assert_array_equal(example_noise(key, 12, 1, 3, [int(TIMESTEPS[i])], SHAPE)[0], full[i])


def test_vmap_and_jit_give_the_bits_of_a_loop():
    key = loss_key(0)
    rows = np.array([5, 0, 2**31 - 1, 118_287, 17, 3, 99], np.int32)
    flips = np.array([0, 1, 1, 0, 1, 0, 0], np.int32)
    captions = np.array([0, 4, 2, 1, 3, 0, 4], np.int32)
    loop = np.stack(
        [example_noise(key, int(r), int(f), int(c), TIMESTEPS, SHAPE) for r, f, c in zip(rows, flips, captions)]
    )

    def batch(rows, flips, captions):
        return jax.vmap(lambda r, f, c: example_noise(key, r, f, c, TIMESTEPS, SHAPE))(rows, flips, captions)

    np.testing.assert_array_equal(batch(rows, flips, captions), loop)
    np.testing.assert_array_equal(jax.jit(batch)(rows, flips, captions), loop)
    for part in (slice(0, 1), slice(2, 5), slice(None, None, -1)):
        np.testing.assert_array_equal(jax.jit(batch)(rows[part], flips[part], captions[part]), loop[part])


def test_float64_mode_does_not_change_the_noise():
    reference = example_noise(loss_key(2**31 + 3), 4, 0, 0, TIMESTEPS, SHAPE)
    with jax.enable_x64(True):
        noise = example_noise(loss_key(2**31 + 3), 4, 0, 0, TIMESTEPS, SHAPE)
    assert noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise, reference)


def test_the_fold_order_is_row_flip_caption_timestep():
    """Written out from the primitives, so that stored losses stay comparable across versions."""
    key = jax.random.key(11, impl="threefry2x32")
    for index in (123, 1, 4, 650):
        key = jax.random.fold_in(key, index)
    expected = jax.random.normal(key, SHAPE, jnp.float32)
    np.testing.assert_array_equal(example_noise(loss_key(11), 123, 1, 4, [650], SHAPE)[0], expected)
    np.testing.assert_array_equal(example_noise(loss_key(11), 123, True, 4, [650], SHAPE)[0], expected)


def test_every_index_changes_the_noise():
    grid = list(itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 1), (0, 1, 2)))
    draws = {example_noise(loss_key(s), r, f, c, [t], (4,)).tobytes() for s, r, f, c, t in grid}
    assert len(draws) == len(grid)


def test_noise_is_standard_normal_and_uncorrelated():
    rows = np.arange(2000)
    key = loss_key(0)
    noise = np.asarray(jax.vmap(lambda r: example_noise(key, r, 0, 0, [0, 50], (4, 4)))(rows), np.float64)
    draws = noise.size  # 64,000: standard errors of mean, variance and correlation are about 1 / sqrt(draws)
    assert abs(noise.mean()) < 5 / draws**0.5
    assert abs(noise.var() - 1) < 5 * (2 / draws) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / draws) ** 0.5
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 5 * (2 / draws) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / draws**0.5


def test_purpose_keys_differ_from_each_other_and_from_the_loss_key():
    data = {
        purpose: np.asarray(jax.random.key_data(purpose_key(3, purpose))).tobytes() for purpose in ("fisher", "query")
    }
    assert len({*data.values(), np.asarray(jax.random.key_data(loss_key(3))).tobytes()}) == 3
    expected = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), FISHER_FOLD)
    assert data["fisher"] == np.asarray(jax.random.key_data(expected)).tobytes()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed!r}"):
        loss_key(seed)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: example_noise(jax.random.key(0, impl="rbg"), 0, 0, 0, [0], SHAPE), TypeError, "key .*rbg"),
        (lambda: example_noise(jax.random.key_data(loss_key(0)), 0, 0, 0, [0], SHAPE), TypeError, "key is"),
        (
            lambda: jax.jit(lambda k: example_noise(k, 0, 0, 0, [0], SHAPE))(jax.random.key(0, impl="rbg")),
            TypeError,
            "key .*rbg",
        ),
        (lambda: example_noise(loss_key(0), 2**31, 0, 0, [0], SHAPE), ValueError, "row_id is 2147483648"),
        (lambda: example_noise(loss_key(0), np.array(2**32 + 5), 0, 0, [0], SHAPE), ValueError, "row_id is 4294967301"),
        (lambda: example_noise(loss_key(0), 1.5, 0, 0, [0], SHAPE), TypeError, "row_id has dtype float"),
        (lambda: purpose_key(0, ""), ValueError, "purpose is"),
    ],
)
def test_bad_arguments_are_refused(call, error, named):
    with pytest.raises(error, match=named):
        call()
