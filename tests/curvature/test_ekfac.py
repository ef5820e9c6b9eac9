"""EKFAC against dense float64 Fisher blocks of a tiny model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.weights import flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.curvature import fisher_ekfac
from attrib_jax.curvature.ekfac import eigenbases, eigenvalue_sums, factor_sums, linear_layers
from attrib_jax.models.unet import Attention, ProjectedText

WIDTH, TEXT_WIDTH, LENGTH, COUNT = 6, 5, 4, 24
KEY, VALUE = "attn2/to_k/kernel", "attn2/to_v/kernel"


class Tiny(nn.Module):
    """A denoiser of (positions, WIDTH) given text (LENGTH, TEXT_WIDTH), with the names of a transformer block."""

    @nn.compact
    def __call__(self, x, text):
        x = x + Attention(2, name="attn1")(nn.Dense(WIDTH, name="proj")(x))
        x = x + Attention(2, name="attn2")(jnp.tanh(x), ProjectedText(text, {}))
        return x + nn.Dense(WIDTH, name="out")(jnp.tanh(x))


def loss_fn(selected, rest, example):
    params = merge_weights(selected, rest)
    predicted = Tiny().apply({"params": params}, example["x"][None], example["text"][None])[0]
    return jnp.mean(jnp.square(predicted - example["target"]))


def make_batch(count=COUNT, dtype=np.float64):
    rng = np.random.default_rng(3)
    shapes = {"x": (3, WIDTH), "text": (LENGTH, TEXT_WIDTH), "target": (3, WIDTH)}
    return {name: rng.normal(size=(count, *shape)).astype(dtype) for name, shape in shapes.items()}


def make_params(dtype=np.float64):
    batch, rng = make_batch(1), np.random.default_rng(1)
    shapes = jax.eval_shape(Tiny().init, jax.random.key(0), batch["x"], batch["text"])["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, dtype), shapes)


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem():
    """The weights of all attention, the curvature fitted on a batch, and every example's dense gradient."""
    selected, rest = select_weights(make_params(), "attn")
    batch = make_batch()
    gradient = jax.jit(jax.grad(loss_fn))
    gradients = [gradient(selected, rest, {name: x[index] for name, x in batch.items()}) for index in range(COUNT)]
    gradients = {
        name: np.stack([np.asarray(flatten_names(g)[name]) for g in gradients]) for name in flatten_names(selected)
    }
    return selected, rest, batch, fisher_ekfac(loss_fn, selected, rest, batch), gradients


def dense(gradients):
    """(N, in, out) -> the Fisher block (in * out, in * out)."""
    rows = gradients.reshape(len(gradients), -1)
    return rows.T @ rows / len(rows)


def basis_of(curvature, name):
    """(in * out, in * out): the eigenvectors as columns, in the order of the kernel's values."""
    source = dict(curvature.inputs)[name]
    return np.kron(curvature.input_bases[source], curvature.output_bases[name])


def eigenvalues_of(curvature):
    return curvature.eigenvalues.to_flat()


def test_key_and_value_projections_share_the_factor_of_the_text(problem):
    _, _, _, curvature, _ = problem
    inputs = dict(curvature.inputs)
    assert inputs[KEY] == inputs[VALUE] == KEY
    assert inputs["attn2/to_q/kernel"] == "attn2/to_q/kernel"
    assert inputs["attn1/to_q/kernel"] == inputs["attn1/to_k/kernel"] == inputs["attn1/to_v/kernel"]
    assert len(curvature.input_bases) == 5 and len(curvature.output_bases) == 8


def test_eigenvalues_are_the_diagonal_of_the_dense_block_in_the_eigenbasis(problem):
    _, _, _, curvature, gradients = problem
    bias = "attn1/to_out_0/bias"  # leaves that are no kernels keep the diagonal
    assert bias not in dict(curvature.inputs)
    np.testing.assert_allclose(eigenvalues_of(curvature)[bias], (gradients[bias] ** 2).mean(axis=0), rtol=1e-9)
    for name in dict(curvature.inputs):
        basis = basis_of(curvature, name)
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
        expected = np.diag(basis.T @ dense(gradients[name]) @ basis)
        got = eigenvalues_of(curvature)[name].ravel()
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-13 * expected.max(), err_msg=name)


def test_bases_are_those_of_the_second_moments_of_text_and_output_gradients(problem):
    selected, rest, batch, curvature, _ = problem
    text = batch["text"].reshape(-1, TEXT_WIDTH)
    rotated = curvature.input_bases[KEY].T @ (text.T @ text) @ curvature.input_bases[KEY]
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-10 * np.abs(rotated).max())

    # Gradients by each token's key independently: one more text feature a token, whose kernel row is its offset.
    def with_offset(offset, example):
        text = jnp.concatenate([example["text"], jnp.eye(LENGTH)], axis=1)
        flat = flatten_names(merge_weights(selected, rest))
        flat[KEY] = jnp.concatenate([flat[KEY], offset])
        flat[VALUE] = jnp.concatenate([flat[VALUE], jnp.zeros((LENGTH, WIDTH))])
        return loss_fn(unflatten_names(flat), {}, {**example, "text": text})

    rows = jax.jit(jax.vmap(jax.grad(with_offset), (None, 0)))(jnp.zeros((LENGTH, WIDTH)), batch).reshape(-1, WIDTH)
    rotated = curvature.output_bases[KEY].T @ (rows.T @ rows) @ curvature.output_bases[KEY]
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-10 * np.abs(rotated).max())


def test_solve_is_the_inverse_of_the_dense_matrix(problem):
    selected, _, _, curvature, _ = problem
    rng = np.random.default_rng(2)
    vector = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), selected)
    curvature.check_solvable(vector, 1e-4)
    solved = flatten_names(jax.jit(lambda c, v: c.solve(v, 1e-4))(curvature, vector))
    for name, leaf in flatten_names(vector).items():
        values = eigenvalues_of(curvature)[name].ravel()
        damped = values + 0.1 * values.mean() + 1e-4
        basis = basis_of(curvature, name) if name in dict(curvature.inputs) else np.eye(leaf.size)
        expected = np.linalg.solve(basis * damped @ basis.T, leaf.ravel())
        np.testing.assert_allclose(solved[name].ravel(), expected, rtol=1e-8, atol=1e-10 * abs(expected).max())


def test_error_is_at_most_that_of_kfac_and_of_the_diagonal(problem):
    selected, rest, batch, curvature, gradients = problem
    layers = linear_layers(loss_fn, selected, rest, {name: x[0] for name, x in batch.items()})
    factors = jax.jit(factor_sums, static_argnums=(0, 1))(loss_fn, layers, selected, rest, batch)
    for layer in layers:
        block = dense(gradients[layer.name])
        basis = basis_of(curvature, layer.name)
        tokens = COUNT * layer.shape[-2]
        kfac = np.kron(factors.inputs[layer.input] / tokens, factors.outputs[layer.name] / 2.0**64 / COUNT)
        ekfac = basis * eigenvalues_of(curvature)[layer.name].ravel() @ basis.T
        error = np.linalg.norm(block - ekfac)
        assert error <= np.linalg.norm(block - kfac)
        assert error <= np.linalg.norm(block - np.diag(np.diag(block)))


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="to_k")(x)


def test_a_kronecker_fisher_is_solved_as_the_dense_one():
    """Every input beside every output gradient, one token: F is A (x) S, and EKFAC is exact."""
    rng = np.random.default_rng(5)
    x, g = rng.normal(size=(7, 3)) @ rng.normal(size=(3, 3)), rng.normal(size=(6, 4)) @ rng.normal(size=(4, 4))
    batch = {"x": np.repeat(x, 6, axis=0), "g": np.tile(g, (7, 1))}
    selected = {"to_k": {"kernel": rng.normal(size=(3, 4))}}

    def loss(selected, rest, example):
        return OneLayer().apply({"params": selected}, example["x"]) @ example["g"]

    curvature = fisher_ekfac(loss, selected, {}, batch, relative_damping=0.0)
    rows = np.einsum("ni,no->nio", batch["x"], batch["g"]).reshape(42, -1)
    fisher = rows.T @ rows / 42
    np.testing.assert_allclose(fisher, np.kron(x.T @ x / 7, g.T @ g / 6), rtol=1e-9, atol=1e-12)
    vector = rng.normal(size=(3, 4))
    for damping in (0.0, 0.3):
        solved = curvature.solve({"to_k": {"kernel": vector}}, damping)["to_k"]["kernel"]
        expected = np.linalg.solve(fisher + damping * np.eye(12), vector.ravel())
        np.testing.assert_allclose(solved.ravel(), expected, rtol=1e-8)


def test_padding_adds_exactly_zero(problem):
    selected, rest, batch, curvature, _ = problem
    mask = np.arange(COUNT) % 5 != 2
    spoilt = {name: np.where(mask.reshape(-1, 1, 1), x, np.nan) for name, x in batch.items()}
    zeroed = {name: np.where(mask.reshape(-1, 1, 1), x, 0) for name, x in batch.items()}
    layers = linear_layers(loss_fn, selected, rest, {name: x[0] for name, x in batch.items()})
    run = jax.jit(factor_sums, static_argnums=(0, 1))
    got, expected = (run(loss_fn, layers, selected, rest, x, mask) for x in (spoilt, zeroed))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    bases = eigenbases(got)
    run = jax.jit(eigenvalue_sums, static_argnums=(0, 1), static_argnames="microbatch")
    got, expected = (run(loss_fn, layers, bases, selected, rest, x, mask, microbatch=6) for x in (spoilt, zeroed))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert int(got.count) == mask.sum()


def test_float32_agrees_with_float64(problem):
    _, _, batch, curvature, gradients = problem
    selected, rest = select_weights(make_params(np.float32), "cross-attn-kv")
    single = fisher_ekfac(loss_fn, selected, rest, {name: x.astype(np.float32) for name, x in batch.items()})
    vector = {name: gradients[name][0] for name in gradients}
    expected = flatten_names(curvature.solve(unflatten_names(vector)))
    vector = unflatten_names({name: vector[name].astype(np.float32) for name in (KEY, VALUE)})
    for name, got in flatten_names(single.solve(vector)).items():
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1], name="to_k")
        return layer(layer(x))


@pytest.mark.parametrize(
    ("loss", "options", "named"),
    [
        (lambda s, r, e: Twice().apply({"params": s}, e["x"]).sum(), {}, "'to_k/kernel'"),
        (lambda s, r, e: (e["x"] @ s["to_k"]["kernel"]).sum(), {}, "nn.Dense .*to_k/kernel"),
        (lambda s, r, e: 0.0, {"relative_damping": -1}, "relative_damping is -1"),
    ],
)
def test_models_without_factors_and_layers_that_run_twice_are_refused(loss, options, named):
    selected = {"to_k": {"kernel": np.ones((3, 3)), "bias": np.ones(3)}}
    with pytest.raises(ValueError, match=named):
        fisher_ekfac(loss, selected, {}, {"x": np.ones((2, 3))}, **options)


def test_gradients_that_cannot_be_solved_are_named(problem):
    selected, _, _, curvature, _ = problem
    zeros = jax.tree.map(jnp.zeros_like, curvature.eigenvalues)
    empty = dataclasses.replace(curvature, relative_damping=0.0, eigenvalues=zeros)
    spoilt = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), selected)
    for fitted, gradient, named in (
        (curvature, {"attn2": selected["attn2"]}, "selected weights"),
        (curvature, spoilt, "NaN"),
        (empty, selected, "is 0 for .*damping"),
    ):
        with pytest.raises(ValueError, match=named):
            fitted.check_solvable(gradient)
