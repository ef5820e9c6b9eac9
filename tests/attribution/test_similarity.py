"""Similarities of latents against dense references."""

import numpy as np
import pytest

from attrib_jax.attribution.similarity import centred_products, gaussian_similarities

LATENTS = np.random.default_rng(0).normal(size=(1300, 2, 3, 3, 2)).astype(np.float32)
ROWS = np.random.default_rng(1).permutation(1300)[:1100]
QUERY = np.random.default_rng(2).normal(size=(3, 3, 2)).astype(np.float32)
FLAT, FLAT_QUERY = LATENTS.reshape(1300, 2, -1).astype(np.float64), QUERY.ravel().astype(np.float64)


@pytest.mark.parametrize("flips", [1, 2])
def test_gaussian_similarities(flips):
    found = gaussian_similarities(LATENTS, ROWS, flips, QUERY, 2.5)
    squared = np.square(FLAT[ROWS, :flips] - FLAT_QUERY).sum(axis=-1)
    np.testing.assert_allclose(found, np.exp(-squared / (2 * 2.5**2)), rtol=1e-12)
    own = gaussian_similarities(LATENTS, ROWS, flips, LATENTS[ROWS[7], 0], 0.0)
    assert own[7, 0] == 1 and own.sum() == 1


@pytest.mark.parametrize("flips", [1, 2])
def test_centred_products_are_those_of_the_members_and_0_for_others(flips):
    members = np.random.default_rng(3).random(1100) < 0.3
    found = centred_products(LATENTS, ROWS, flips, QUERY, members)
    inside = FLAT[ROWS[members], :flips]
    mean = inside.mean(axis=(0, 1))
    np.testing.assert_allclose(found[members], (inside - mean) @ (FLAT_QUERY - mean), atol=1e-10)
    assert abs(found[members].sum()) < 1e-8
    assert not found[~members].any()
    # One image is its own mean.
    np.testing.assert_allclose(centred_products(LATENTS, ROWS, 1, QUERY, np.arange(1100) == 4), 0, atol=1e-12)
