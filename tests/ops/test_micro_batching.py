"""Groups that follow each other: their sizes, and the results of all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.ops.micro_batching import even_group_size, group_size, map_groups, num_pixels, sum_groups


@pytest.mark.parametrize(
    ("count", "pixels", "expected", "even"),
    [
        (8, 10, 8, 8),  # all fit
        (8, 30, 2, 2),  # three would fit, two divide eight
        (7, 30, 3, 1),  # a prime number: three, three and one
        (143, 10, 10, 1),
        (20, 10, 10, 10),
        (4, 1000, 1, 1),  # one at least
    ],
)
def test_group_sizes(count, pixels, expected, even):
    assert group_size(count, pixels, 100) == expected
    assert even_group_size(count, pixels, 100) == even
    assert num_pixels((pixels, 3, 4)) == pixels * 3


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_groups_give_what_all_at_once_give(size):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(6, 3)).astype(np.float32), "n": np.arange(6, dtype=np.int32)}

    def fn(entry):
        return jnp.sum(jnp.sin(entry["x"])) * entry["n"], entry["x"]

    expected = jax.vmap(fn)(batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), map_groups(jax.vmap(fn), size, batch), expected
    )
    if size != 4:
        total = sum_groups(lambda part: jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(fn)(part)), batch, size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-5), total, expected)
