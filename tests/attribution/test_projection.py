"""Random projections against matrices written out, and that they keep inner products."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.projection import project, sketch, sketched_numbers
from attrib_jax.core.keys import purpose_key
from attrib_jax.models.projected_text import ProjectedWeights

KEY = purpose_key(3, "projection")
SHAPES = {"a/kernel": (23, 30), "a/bias": (5,), "b/kernel": (40, 16)}
run = jax.jit(project, static_argnames=("kind", "dim"))


def make_tree(count=7, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    leaf = {name: rng.normal(size=(count, *shape)).astype(dtype) for name, shape in SHAPES.items()}
    return {"a": {"kernel": leaf["a/kernel"], "bias": leaf["a/bias"]}, "b": {"kernel": leaf["b/kernel"]}}


def flat(tree):
    leaves = tree["a"]["bias"], tree["a"]["kernel"], tree["b"]["kernel"]
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def block_bits(name, block, shape):
    leaf_key = jax.random.fold_in(KEY, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    return np.asarray(jax.random.bits(jax.random.fold_in(leaf_key, block), shape, jnp.uint32))


def dense_block(name, block, dim):
    words = block_bits(name, block, (256, -(-dim // 32)))
    matrix = np.empty((256, dim))
    for row in range(256):
        for column in range(dim):
            matrix[row, column] = -1 if words[row, column // 32] >> (column % 32) & 1 else 1
    return matrix / np.sqrt(dim)


def sparse_block(name, block, dim):
    rows = dim // 4
    bits = block_bits(name, block, (rows + 4,))
    matrix = np.zeros((rows, dim))
    for row in range(rows):
        for stripe in range(4):
            place = (row + int(bits[rows + stripe]) % rows) % rows
            matrix[row, stripe * rows + place] = -0.5 if bits[row] >> stripe & 1 else 0.5
    return matrix


def grouped_block(name, block, dim):
    bits = block_bits(name, block, (dim + 1,))
    matrix = np.zeros((dim, dim))
    for row in range(dim):
        matrix[row, (row + int(bits[dim]) % dim) % dim] = -1 if bits[row] & 1 else 1
    return matrix


BLOCKS = {
    "rademacher": (dense_block, lambda dim: 256),
    "sparse": (sparse_block, lambda dim: dim // 4),
    "grouped": (grouped_block, lambda dim: dim),
}


@pytest.mark.parametrize(
    ("kind", "dim"), [("rademacher", 64), ("rademacher", 50), ("sparse", 64), ("sparse", 2000), ("grouped", 50)]
)
def test_equals_the_matrix_written_out(kind, dim):
    make_block, rows = BLOCKS[kind]
    parts = []
    for name in sorted(SHAPES):
        size, rows_of_block = int(np.prod(SHAPES[name])), rows(dim)
        blocks = [make_block(name, block, dim) for block in range(-(-size // rows_of_block))]
        parts.append(np.concatenate(blocks)[:size])
    matrix = np.concatenate(parts)
    with jax.enable_x64(True):
        tree = make_tree(dtype=np.float64)
        np.testing.assert_allclose(run(tree, KEY, kind, dim), flat(tree) @ matrix, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run(make_tree(), KEY, kind, dim), flat(make_tree()) @ matrix, rtol=1e-4, atol=1e-4)


def test_many_sparse_blocks_are_added_in_steps():
    """Blocks of one row, and more of them than are drawn at once."""
    values = np.zeros((1, 40_000), np.float32)
    places = {0: 1.0, 32_767: 2.0, 32_768: 4.0, 39_999: 8.0}
    values[0, list(places)] = list(places.values())
    expected = sum(value * sparse_block("a", place, 4)[0] for place, value in places.items())
    np.testing.assert_array_equal(project({"a": values}, KEY, "sparse", 4)[0], expected)


@pytest.mark.parametrize("kind", ["rademacher", "sparse", "grouped"])
def test_inner_products_are_kept_in_expectation_with_the_variance_stated(kind):
    dim, seeds = 32, 2000
    tree = make_tree(2)
    keys = jax.vmap(lambda seed: jax.random.fold_in(KEY, seed))(jnp.arange(seeds))
    projected = jax.jit(jax.vmap(lambda key: project(tree, key, kind, dim)))(keys)
    first, second = np.moveaxis(np.asarray(projected, np.float64), 1, 0)
    products = np.stack([np.sum(first * second, axis=1), np.sum(first * first, axis=1)])
    a, b = flat(tree)
    for got, exact, variance in zip(
        products, (a @ b, a @ a), ((a @ a * (b @ b) + (a @ b) ** 2) / dim, 2 * (a @ a) ** 2 / dim)
    ):
        assert abs(got.mean() - exact) < 4 * np.sqrt(variance / seeds)
        assert 0.8 < got.var() / variance < 1.2


@pytest.mark.parametrize("kind", ["rademacher", "sparse"])
def test_an_example_does_not_depend_on_its_batch_nor_a_leaf_on_the_others(kind):
    tree = make_tree()
    whole = run(tree, KEY, kind, 64)
    np.testing.assert_allclose(
        run(jax.tree.map(lambda leaf: leaf[2:5], tree), KEY, kind, 64), whole[2:5], rtol=1e-5, atol=1e-5
    )
    parts = [run({"b": tree["b"]}, KEY, kind, 64), run({"a": tree["a"]}, KEY, kind, 64)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dim", "key", "named"),
    [
        ("spars", 64, KEY, "'sparse'"),
        ("sparse", 66, KEY, "projection_dim is 66"),
        ("factored", 66, KEY, "projection_dim is 66"),
        ("rademacher", 0, KEY, "projection_dim is 0"),
        ("sparse", 64, jax.random.key(0, impl="rbg"), "rbg"),
    ],
)
def test_wrong_settings_are_refused(kind, dim, key, named):
    with pytest.raises((ValueError, TypeError), match=named):
        project(make_tree(), key, kind, dim)


def factors(seed=0):
    """Gradients of two kernels in factors, (B, L, F) each beside columns (B, D, L), and of a bias."""
    rng = np.random.default_rng(seed)
    projections = {"a": {"kernel": rng.normal(size=(3, 4, 40))}, "b": {"kernel": rng.normal(size=(3, 4, 6))}}
    return ProjectedWeights({"c": {"bias": rng.normal(size=(3, 5))}}, projections), rng.normal(size=(3, 30, 4))


def test_sketches_of_factors_are_those_of_the_dense_gradients():
    with jax.enable_x64(True):
        gradient, columns = factors()
        found = sketch(gradient, jnp.asarray(columns), KEY, 16)
        dense = {name: {"kernel": columns @ gradient.projections[name]["kernel"]} for name in "ab"}
        whole = sketch(ProjectedWeights({**dense, **gradient.others}, {}), jnp.asarray(columns), KEY, 16)
        jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12), found, whole)
        assert found["a"]["kernel"].shape == (3, 16, 16) and found["b"]["kernel"].shape == (3, 16, 6)
        np.testing.assert_array_equal(found["c"]["bias"], gradient.others["c"]["bias"])
        # No side is longer: the gradients themselves.
        np.testing.assert_allclose(sketch(gradient, jnp.asarray(columns), KEY, 40)["a"]["kernel"], dense["a"]["kernel"])
    leaves = {"a": np.zeros((30, 40)), "b": np.zeros((30, 6)), "c": np.zeros(5)}
    assert sketched_numbers(leaves, 16) == 16 * 16 + 16 * 6 + 5


def test_sketched_inner_products_are_kept_in_expectation_within_the_bound():
    side, seeds = 16, 2000
    rng = np.random.default_rng(1)
    # Two gradients of rank 1, the worst case.
    columns = rng.normal(size=(2, 30, 1)).astype(np.float32)
    gradient = ProjectedWeights({}, {"a": rng.normal(size=(2, 1, 40)).astype(np.float32)})
    keys = jax.vmap(lambda seed: jax.random.fold_in(KEY, seed))(jnp.arange(seeds))
    found = np.asarray(jax.jit(jax.vmap(lambda key: sketch(gradient, columns, key, side)["a"]))(keys), np.float64)
    a, b = (columns @ gradient.projections["a"]).reshape(2, -1).astype(np.float64)
    first, second = found.reshape(seeds, 2, -1).transpose(1, 0, 2)
    bound = (1 + 2 / side) ** 2 - 1
    for products, exact, scale in (
        (np.sum(first * first, axis=1), a @ a, a @ a),
        (np.sum(first * second, axis=1), a @ b, np.sqrt(a @ a * (b @ b))),
    ):
        assert abs(products.mean() - exact) < 4 * np.sqrt(bound / seeds) * scale
        assert products.var() < 1.2 * bound * scale**2
    assert np.sum(first * first, axis=1).var() > 0.6 * bound * (a @ a) ** 2
