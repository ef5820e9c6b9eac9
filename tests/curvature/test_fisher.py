"""The diagonal Fisher information against dense float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.curvature import FisherSum, fisher_diagonal
from attrib_jax.diffusion.losses import denoising_losses
from tests.attribution import tiny_denoiser

fisher = jax.jit(fisher_diagonal, static_argnames=("loss_fn", "microbatch"))


def denoising_loss(selected, rest, example):
    params = merge_weights(selected, rest)
    arguments = example["latents"], example["text"], example["noise"][None], example["timestep"][None]
    return denoising_losses(tiny_denoiser.predict, params, tiny_denoiser.SCHEDULE, *arguments)[0]


def make_batch(count, dtype):
    _, latents, text = tiny_denoiser.make_data(count, dtype=dtype)
    rng = np.random.default_rng(5)
    return {
        "latents": latents[:, 0],
        "text": text[:, 0],
        "noise": rng.normal(size=latents[:, 0].shape).astype(dtype),
        "timestep": rng.integers(0, 100, size=count, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def reference():
    """name -> mean over 6 examples of the squared float64 gradient, one example at a time; and the examples."""
    with jax.enable_x64(True):
        params = tiny_denoiser.init_params(dtype=np.float64)
        batch = make_batch(6, np.float64)
        total = {name: np.zeros(leaf.shape) for name, leaf in flatten_names(params).items()}
        gradient = jax.jit(jax.grad(denoising_loss))
        for index in range(6):
            example = {name: x[index] for name, x in batch.items()}
            for name, leaf in flatten_names(gradient(params, {}, example)).items():
                total[name] += np.asarray(leaf) ** 2
        return {name: leaf / 6 for name, leaf in total.items()}


def test_equals_dense_reference_in_float64(reference):
    with jax.enable_x64(True):
        params, batch = tiny_denoiser.init_params(dtype=np.float64), make_batch(6, np.float64)
        flat = fisher(denoising_loss, *select_weights(params, "all"), batch).mean().to_flat()
    assert flat.keys() == reference.keys()
    for name, expected in reference.items():
        np.testing.assert_allclose(flat[name], expected, rtol=1e-9, atol=1e-13 * expected.max(), err_msg=name)


def test_equals_dense_reference_in_float32_for_key_and_value_projections(reference):
    selected, rest = select_weights(tiny_denoiser.init_params(), "cross-attn-kv")
    flat = fisher(denoising_loss, selected, rest, make_batch(6, np.float32), microbatch=2).mean().to_flat()
    assert len(flat) == 2
    for name, values in flat.items():
        expected = reference[name]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5 * expected.max(), err_msg=name)


def linear_loss(selected, rest, example):
    return 0.5 * rest["gain"] * (selected["w"] @ example["x"] - example["y"]) ** 2


def linear_problem(count=12, gain=1.0):
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(count, 3)).astype(np.float32), "y": rng.normal(size=count).astype(np.float32)}
    selected = {"w": jnp.asarray([0.3, -1.2, 0.7], jnp.float32)}
    x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
    gradients = gain * (x @ np.asarray(selected["w"], np.float64) - y)[:, None] * x
    return selected, {"gain": jnp.float32(gain)}, batch, gradients


@pytest.mark.parametrize("gain", [1e-22, 1e-25, 1.0, 1e5])
def test_squares_of_tiny_and_large_gradients_survive_float32(gain):
    selected, rest, batch, gradients = linear_problem(gain=gain)
    diagonal = fisher(linear_loss, selected, rest, batch).mean()
    np.testing.assert_allclose(diagonal.to_flat()["w"], (gradients**2).mean(axis=0), rtol=1e-5)
    step = diagonal.solve({"w": jnp.asarray(gradients[0], jnp.float32)})
    np.testing.assert_allclose(step["w"], gradients[0] / (gradients**2).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("microbatch", [None, 1, 2, 8])
def test_padding_adds_exactly_zero_even_where_its_gradient_is_nan(microbatch):
    selected, rest, batch, gradients = linear_problem(count=8)
    mask = np.array([1, 0, 1, 1, 0, 1, 0, 1], np.float32)
    zeroed, spoilt = {}, {}
    for name, x in batch.items():
        keep = mask.reshape(-1, *(1,) * (x.ndim - 1)) > 0
        zeroed[name], spoilt[name] = np.where(keep, x, 0), np.where(keep, x, np.nan)
    expected = fisher(linear_loss, selected, rest, zeroed, mask, microbatch)
    got = fisher(linear_loss, selected, rest, spoilt, mask, microbatch)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert int(got.count) == 5
    np.testing.assert_allclose(got.mean().to_flat()["w"], (gradients[mask > 0] ** 2).mean(axis=0), rtol=1e-5)
    empty = fisher(linear_loss, selected, rest, spoilt, np.zeros(8), microbatch)
    assert int(empty.count) == 0 and not np.any(empty.sum["w"]) and not np.any(empty.compensation["w"])


def test_sums_of_batches_add_up():
    selected, rest, batch, gradients = linear_problem()
    x, y = batch["x"].reshape(3, 4, 3), batch["y"].reshape(3, 4)
    total = sum(fisher(linear_loss, selected, rest, {"x": x[part], "y": y[part]}) for part in range(3))
    assert isinstance(total, FisherSum) and int(total.count) == 12
    np.testing.assert_allclose(total.mean().to_flat()["w"], (gradients**2).mean(axis=0), rtol=1e-5)
    with pytest.raises(TypeError):
        _ = total + 1


def test_a_long_sum_does_not_drift():
    """50,000 batches: the pair of floats keeps the total right where a plain float32 sum is off by nearly 1e-6."""
    values = np.random.default_rng(0).uniform(0.5, 1.5, size=50_000).astype(np.float32)
    zero = {"w": jnp.zeros((), jnp.float32)}

    @jax.jit
    def add_all(values):
        start = FisherSum(zero, jnp.int32(0), zero)
        return jax.lax.scan(lambda total, x: (total + FisherSum({"w": x}, jnp.int32(1), zero), None), start, values)[0]

    total = add_all(values)
    exact = values.astype(np.float64).sum()
    pair = float(np.float64(total.sum["w"]) + np.float64(total.compensation["w"]))
    assert abs(pair - exact) < 1e-10 * exact
    plain = float(np.cumsum(values, dtype=np.float32)[-1])
    assert abs(plain - exact) > 1e-7 * exact


@pytest.mark.parametrize(
    ("options", "named"), [({"microbatch": 5}, "microbatch=5.* 12"), ({"mask": np.ones(11)}, "leading axis")]
)
def test_wrong_shapes_are_refused(options, named):
    selected, rest, batch, _ = linear_problem()
    with pytest.raises(ValueError, match=named):
        fisher(linear_loss, selected, rest, batch, **options)
