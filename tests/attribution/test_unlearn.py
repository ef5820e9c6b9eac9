"""Query gradients and unlearning steps against formulas written out in numpy, and what they do to a trained model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attrib_jax.attribution import newton_step, query_gradient, scale_by_newton, score_dataset, sgd_step, unlearn
from attrib_jax.attribution.unlearn import query_draws
from attrib_jax.core.keys import loss_key, purpose_key
from attrib_jax.core.weights import WEIGHT_SUBSETS, flatten_names, merge_weights, select_weights
from attrib_jax.curvature import Diagonal, fisher_diagonal
from attrib_jax.diffusion.losses import denoising_losses
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict

KEY = purpose_key(0, "query")
SHAPE = (tiny_denoiser.SIZE, tiny_denoiser.SIZE, tiny_denoiser.CHANNELS)


def query():
    _, latents, text = tiny_denoiser.make_data(1, seed=9)
    return latents[0, 0], text[0, 0]


def ones_curvature(selected):
    return Diagonal(jax.tree.map(jnp.ones_like, selected))


def random_problem(seed=0):
    """Weights, gradient and F; F is 0 in one place where the gradient is."""
    rng = np.random.default_rng(seed)
    tree = {"a": {"kernel": rng.normal(size=(3, 4))}, "b": {"kernel": rng.normal(size=(5,))}}
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape), tree)
    fisher = jax.tree.map(lambda x: rng.uniform(0.2, 3, size=x.shape), tree)
    gradient["a"]["kernel"][1, 2] = fisher["a"]["kernel"][1, 2] = 0
    return tree, gradient, fisher


def test_draws_depend_on_their_number_only_and_have_no_repeated_timestep():
    draws = jax.jit(query_draws, static_argnums=(2, 3))
    timesteps, noise = draws(KEY, jnp.arange(250), 100, SHAPE)
    for block in (timesteps[:100], timesteps[100:200]):
        np.testing.assert_array_equal(np.sort(block), np.arange(100))
    assert len(set(timesteps[200:].tolist())) == 50
    assert (timesteps[:100] != timesteps[100:200]).any()
    some = np.array([3, 249, 100])
    few_timesteps, few_noise = draws(KEY, some, 100, SHAPE)
    np.testing.assert_array_equal(few_timesteps, timesteps[some])
    np.testing.assert_array_equal(few_noise, noise[some])
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    assert len(np.unique(np.asarray(noise))) > 0.999 * noise.size


def scaled(params, noisy, timestep, text):
    """A denoiser of large latents that costs little."""
    return jnp.tanh(noisy * params["w"]) + jnp.mean(text) + timestep / 100


def test_draws_too_large_to_be_taken_at_once_are_summed_in_groups():
    latents = np.random.default_rng(0).normal(size=(64, 64, 2)).astype(np.float32)
    arguments = scaled, SCHEDULE, {"w": jnp.ones(2)}, {}, latents, query()[1], KEY, 11
    found, expected = (query_gradient(*arguments, tile=tile) for tile in (8, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


def test_query_gradient_is_the_mean_over_its_draws():
    """23 draws: neither tile size divides them, and the reference is one gradient of a plain mean."""
    latents, text = query()
    params = tiny_denoiser.init_params()
    selected, rest = select_weights(params, "attn")
    mask = np.zeros((4, 4), np.float32)
    mask[1:3, :2] = 1
    timesteps, noise = query_draws(KEY, np.arange(23), 100, SHAPE)

    @jax.jit
    @jax.value_and_grad
    def reference(selected):
        losses = denoising_losses(
            predict, merge_weights(selected, rest), SCHEDULE, latents, text, noise, timesteps, mask=mask
        )
        return losses.mean()

    loss, gradient = reference(selected)
    function = jax.jit(query_gradient, static_argnames=("predict", "draws", "tile"))
    for tile in (5, 16):
        got = function(predict, SCHEDULE, selected, rest, latents, text, KEY, 23, mask=mask, tile=tile)
        np.testing.assert_allclose(got.loss, loss, rtol=1e-5)
        for name, expected in flatten_names(gradient).items():
            actual = flatten_names(got.gradient)[name]
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6 * abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_newton_step_is_equation_5(damping):
    theta, gradient, fisher = jax.tree.map(jnp.float32, random_problem())
    new = newton_step(theta, gradient, Diagonal(fisher), 0.7, 40, damping)
    for name in ("a", "b"):
        t, g, f = (np.float64(tree[name]["kernel"]) for tree in (theta, gradient, fisher))
        expected = t + 0.7 / 40 * np.divide(g, f + damping, out=np.zeros_like(g), where=g != 0)
        np.testing.assert_allclose(new[name]["kernel"], expected, rtol=1e-6)
        ascended = sgd_step(theta, gradient, 0.5)[name]["kernel"]
        np.testing.assert_array_equal(ascended, theta[name]["kernel"] + 0.5 * gradient[name]["kernel"])


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_kept_ewc_gradient_is_newtons_method_on_the_dense_objective(damping):
    """-L + N/2 (theta-theta0)^T (F + damping) (theta-theta0) by jax.grad, with the dense Hessian of its second term."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        theta0 = jnp.asarray(rng.normal(size=6))
        fisher = jnp.asarray(rng.uniform(0.5, 2, size=6))
        num_examples, alpha = 12, 0.6

        def loss(theta):
            return jnp.sum(jnp.sin(theta) ** 3) + theta[0] * theta[4]

        def ewc(theta):
            return num_examples / 2 * (theta - theta0) @ jnp.diag(fisher + damping) @ (theta - theta0)

        transformation = scale_by_newton(Diagonal(fisher), num_examples, damping, keep_ewc_gradient=True)
        state = transformation.init(theta0)
        got = expected = theta0
        for step in range(4):
            direction, state = transformation.update(jax.grad(loss)(got), state, got)
            got = got + alpha * direction
            objective_gradient = jax.grad(lambda theta: ewc(theta) - loss(theta))(expected)
            expected = expected - alpha * jnp.linalg.solve(jax.hessian(ewc)(expected), objective_gradient)
            np.testing.assert_allclose(got, expected, rtol=1e-10)
            if step == 0:
                plain = newton_step(theta0, jax.grad(loss)(theta0), Diagonal(fisher), alpha, num_examples, damping)
                np.testing.assert_allclose(got, plain, rtol=1e-12)
                by_optax = optax.chain(scale_by_newton(Diagonal(fisher), num_examples, damping), optax.scale(alpha))
                update, _ = jax.jit(by_optax.update)(jax.grad(loss)(theta0), by_optax.init(theta0))
                np.testing.assert_allclose(theta0 + update, plain, rtol=1e-12)
        with pytest.raises(ValueError, match="params is None"):
            transformation.update(theta0, state)


@pytest.mark.parametrize("keep_ewc_gradient", [False, True])
def test_unlearn_takes_fresh_draws_at_the_current_weights(keep_ewc_gradient):
    latents, text = query()
    selected, rest = select_weights(tiny_denoiser.init_params(), "cross-attn-kv")
    curvature = ones_curvature(selected)
    done = []
    result = unlearn(
        predict, SCHEDULE, selected, rest, latents, text, KEY,
        draws=20, step_size=0.5, curvature=curvature, num_examples=4, steps=3, damping=1.0,
        keep_ewc_gradient=keep_ewc_gradient, progress=done.append,
    )  # fmt: skip
    assert done == [20, 40, 60]
    current, losses, norms = selected, [], []
    function = jax.jit(query_gradient, static_argnames=("predict", "draws"))
    for step in range(3):
        step_key = jax.random.fold_in(KEY, step)
        loss, gradient = function(predict, SCHEDULE, current, rest, latents, text, step_key, 20)
        pull = jax.tree.map(lambda new, old: 0.5 * (new - old), current, selected)
        before, current = current, newton_step(current, gradient, curvature, 0.5, 4, 1.0)
        if keep_ewc_gradient:
            current = jax.tree.map(jnp.subtract, current, pull)
        losses.append(loss)
        norms.append(optax.tree.norm(jax.tree.map(jnp.subtract, current, before)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), result.selected, current)
    np.testing.assert_allclose(result.query_loss, losses, rtol=1e-5)
    np.testing.assert_allclose(result.update_norm, norms, rtol=1e-3)


@pytest.mark.parametrize("subset", [subset for subset in WEIGHT_SUBSETS if subset != "lora"])  # the model has none
def test_only_the_selected_weights_move_and_all_of_them_do(subset):
    latents, text = query()
    params = tiny_denoiser.init_params()
    selected, rest = select_weights(params, subset)
    run = functools.partial(unlearn, predict, SCHEDULE, selected, rest, latents, text, KEY, draws=16, step_size=1.0)
    plain = run(method="sgd")
    newton = run(curvature=ones_curvature(selected), num_examples=1)
    # With F = 1 and N = 1 the Newton step is the plain step.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), newton.selected, plain.selected)
    names = flatten_names(selected).keys()
    counts = {"cross-attn-kv": 2, "cross-attn": 5, "attn": 10, "mlp": 2}
    assert counts.get(subset, len(flatten_names(params))) == len(names)
    before = jax.device_get(flatten_names(params))
    for result in (plain, newton):
        after = jax.device_get(flatten_names(merge_weights(result.selected, rest)))
        assert after.keys() == before.keys()
        assert {name for name in before if (after[name] != before[name]).any()} == set(names)


SGD = {"method": "sgd", "curvature": None, "num_examples": None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"curvature": None}, "curvature and num_examples"),
        ({"method": "adam"}, "'adam'"),
        (SGD | {"damping": 0.1}, "'sgd'.*damping"),
        ({"method": "sgd", "num_examples": None}, "'sgd'.*curvature"),
        ({"steps": 0}, "steps is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"step_size": 0}, "step_size is 0"),
        ({"damping": -1}, "damping is -1"),
        ({"mask": np.zeros((4, 4))}, "no latent pixel"),
        *(({"mask": np.full((4, 4), value)}, r"mask .*\[0, 1\]") for value in (np.inf, -1, np.nan)),
        ({"key": jax.random.key(0, impl="rbg")}, "rbg"),
        ({"latents": np.full(SHAPE, np.inf, np.float32)}, "to_k/kernel .*NaN"),
        ({"latents": np.full(SHAPE, np.inf, np.float32), **SGD}, "step 1 of 1"),
    ],
)
def test_bad_arguments_are_refused(changes, named):
    latents, text = query()
    selected, rest = select_weights(tiny_denoiser.init_params(), "cross-attn-kv")
    arguments = {"latents": latents, "text": text, "key": KEY, "draws": 16, "step_size": 1.0}
    arguments |= {"curvature": ones_curvature(selected), "num_examples": 4} | changes
    with pytest.raises((ValueError, TypeError), match=named):
        unlearn(predict, SCHEDULE, selected, rest, **arguments)
    newton = {"step_size": 1.0, "num_examples": 4, "damping": 0.0}
    if newton.keys() & changes.keys() and "method" not in changes:
        with pytest.raises(ValueError, match=named):
            newton_step(selected, selected, ones_curvature(selected), **newton | changes)


def test_a_mask_may_be_nested_lists_and_a_zero_of_the_curvature_needs_damping():
    latents, text = query()
    selected, rest = select_weights(tiny_denoiser.init_params(), "cross-attn-kv")
    run = functools.partial(unlearn, predict, SCHEDULE, selected, rest, latents, text, KEY, draws=16, step_size=1.0)
    mask = np.eye(4, dtype=np.float32)
    found, expected = (run(method="sgd", mask=x).query_loss for x in (mask.tolist(), mask))
    np.testing.assert_array_equal(found, expected)

    fisher = jax.tree.map(jnp.ones_like, selected)
    block = fisher["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_v"]
    block["kernel"] = block["kernel"].at[0, 1].set(0)
    with pytest.raises(ValueError, match="attn2/to_v/kernel .* 1 of 96"):
        run(curvature=Diagonal(fisher), num_examples=4)
    run(curvature=Diagonal(fisher), num_examples=4, damping=1e-3)


def train(params, latents, text, steps=1000):
    """Fits the tiny denoiser to a handful of images by Adam."""
    optimizer = optax.adam(3e-3)

    def mean_loss(params, key):
        keys = jax.random.split(key, len(latents))
        return jax.vmap(functools.partial(random_loss, params))(latents, text, keys).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(loss_key(5), steps)
    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])(params)


def random_loss(params, latents, text, key):
    timestep_key, noise_key = jax.random.split(key)
    timesteps = jax.random.randint(timestep_key, (1,), 0, 100)
    noise = jax.random.normal(noise_key, (1, *latents.shape))
    return denoising_losses(predict, params, SCHEDULE, latents, text, noise, timesteps)[0]


def fisher_loss(selected, rest, example):
    return random_loss(merge_weights(selected, rest), example["latents"], example["text"], example["key"])


def test_unlearning_a_training_image_raises_its_own_loss_most():
    count = 16
    row_id, latents, text = tiny_denoiser.make_data(count, seed=4)
    params = train(tiny_denoiser.init_params(2), latents[:, 0], text[:, 0])
    selected, rest = select_weights(params, "cross-attn-kv")
    examples = {
        "latents": np.repeat(latents[:, 0], 32, axis=0),
        "text": np.repeat(text[:, 0], 32, axis=0),
        "key": jax.random.split(loss_key(6), count * 32),
    }
    curvature = jax.jit(fisher_diagonal, static_argnums=0)(fisher_loss, selected, rest, examples).mean()
    ranks = []
    for member in range(6):
        result = unlearn(
            predict, SCHEDULE, selected, rest, latents[member, 0], text[member, 0], KEY,
            draws=200, step_size=0.1, curvature=curvature, num_examples=count,
        )  # fmt: skip
        after = merge_weights(result.selected, rest)
        scores = score_dataset(
            predict, SCHEDULE, params, after, loss_key(1), row_id, latents, text, np.arange(0, 100, 5), how="none"
        )
        own, others = scores.score[member], np.delete(scores.score, member)
        assert own > 0 and own > others.mean() + 2 * others.std()
        ranks.append(scores.rank_of(member))
    assert max(ranks) <= 2 and ranks.count(1) >= 5, ranks
