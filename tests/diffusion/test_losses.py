"""The denoising loss against a float64 numpy reference written from METHOD.md sections 2 and 5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.diffusion.losses import denoising_loss, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule

TIMESTEPS = np.array([0, 300, 600, 999], np.int32)
H, W, C, L, D = 4, 5, 3, 2, 6


def predict(params, noisy, timestep, text, np=jnp):
    """A small nonlinear model that mixes its inputs, in JAX or numpy."""
    context = np.mean(text @ params["text"], axis=0)
    return np.tanh(noisy @ params["mix"] + context + timestep * params["time"])


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    params = {"text": rng.normal(size=(D, C)), "mix": rng.normal(size=(C, C)), "time": rng.normal(size=C) * 1e-3}
    return {
        "params": params,
        "latents": rng.normal(size=(H, W, C)),
        "text": rng.normal(size=(L, D)),
        "noise": rng.normal(size=(len(TIMESTEPS), H, W, C)),
        "timesteps": TIMESTEPS,
    }


def reference(schedule, example, mask=None):
    weights = np.ones((H, W, 1)) if mask is None else np.asarray(mask, np.float64).reshape(H, W, 1)
    losses = []
    for t, noise in zip(TIMESTEPS, example["noise"]):
        alpha = np.float64(schedule.alphas_cumprod[t])
        noisy = np.sqrt(alpha) * example["latents"] + np.sqrt(1 - alpha) * noise
        target = noise
        if schedule.prediction_type == "v_prediction":
            target = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * example["latents"]
        error = (predict(example["params"], noisy, t, example["text"], np) - target) ** 2
        losses.append((weights * error).sum() / (weights.sum() * C))
    return np.array(losses)


def cast(example, dtype):
    return {k: v if k == "timesteps" else jax.tree.map(lambda x: jnp.asarray(x, dtype), v) for k, v in example.items()}


@pytest.mark.parametrize("masked", ["none", "box", "soft"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_equal_the_reference(example, prediction_type, masked):
    schedule = NoiseSchedule.from_config({"prediction_type": prediction_type})
    mask = None
    if masked == "box":
        mask = np.zeros((H, W, 1), np.float32)
        mask[1:3, 2:4] = 1
    elif masked == "soft":
        mask = np.random.default_rng(1).uniform(size=(H, W)).astype(np.float32)
    expected = reference(schedule, example, mask)

    losses = denoising_losses(predict, schedule=schedule, mask=mask, **cast(example, jnp.float32))
    assert losses.shape == TIMESTEPS.shape and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    with jax.enable_x64(True):
        losses = denoising_losses(predict, schedule=schedule, mask=mask, **cast(example, jnp.float64))
        assert losses.dtype == jnp.float64
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        mean = denoising_loss(predict, schedule=schedule, mask=mask, **cast(example, jnp.float64))
        np.testing.assert_allclose(mean, expected.mean(), rtol=1e-12)


def test_a_masked_pixel_has_no_effect(example):
    schedule = NoiseSchedule.from_config({})
    mask = np.ones((H, W), np.float32)
    mask[0, 0] = 0
    changed = {**example, "noise": example["noise"].copy()}
    changed["noise"][:, 0, 0] += 10
    losses = [
        denoising_losses(predict, schedule=schedule, mask=mask, **cast(e, jnp.float32)) for e in (example, changed)
    ]
    np.testing.assert_array_equal(*losses)


def test_an_empty_mask_gives_zero_loss_and_gradient_in_jit(example):
    schedule = NoiseSchedule.from_config({})
    arguments = cast(example, jnp.float32)
    params = arguments.pop("params")

    @jax.jit
    def value_and_grad(params, mask):
        return jax.value_and_grad(lambda p: denoising_loss(predict, p, schedule, mask=mask, **arguments))(params)

    loss, gradient = value_and_grad(params, jnp.zeros((H, W)))
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_half_precision_models_are_reduced_in_float32(example):
    def zero(params, noisy, timestep, text):
        return jnp.zeros(noisy.shape, jnp.float16)

    arguments = cast(example, jnp.float32)
    noise = jnp.zeros(arguments["noise"].shape, jnp.float16).at[..., 0].set(1e-4)
    arguments |= {"noise": noise, "latents": arguments["latents"].astype(jnp.float16)}
    losses = denoising_losses(zero, schedule=NoiseSchedule.from_config({}), **arguments)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.float64(np.float16(1e-4)) ** 2 / C, rtol=1e-5)  # 1e-8 is 0 in float16


def test_text_is_not_batched_over_timesteps(example):
    """What depends only on the text is computed once: its product stays (L, D) x (D, C) in the jaxpr."""
    schedule = NoiseSchedule.from_config({})
    arguments = cast(example, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda a: denoising_losses(predict, schedule=schedule, **a))(arguments)
    shapes = [eqn.outvars[0].aval.shape for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert sorted(shapes) == [(L, C), (len(TIMESTEPS), H, W, C)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timesteps": 0}, r"timesteps .*\(\)"),
        ({"noise": np.zeros((H, W, C))}, r"noise .*\(4, 5, 3\).*\(4, 4, 5, 3\)"),
        ({"mask": np.ones((W, H))}, r"mask .*\(5, 4\).*\(4, 5\)"),
        ({"predict": lambda *arguments: predict(*arguments)[..., :1]}, r"predict .*\(4, 5, 1\)"),
    ],
)
def test_bad_shapes(example, changes, named):
    arguments = {"predict": predict, "schedule": NoiseSchedule.from_config({})} | cast(example, jnp.float32) | changes
    with pytest.raises(ValueError, match=named):
        denoising_losses(arguments.pop("predict"), **arguments)
