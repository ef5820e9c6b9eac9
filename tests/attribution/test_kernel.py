"""The kernel of projected gradients against numpy's inverse."""

import numpy as np
import pytest

import attrib_jax.attribution.kernel as kernel_module
from attrib_jax.attribution.kernel import Kernel, fit_kernel, kernel_scores, leverages

RNG = np.random.default_rng(0)
PHI, QUERIES = RNG.normal(size=(7, 2, 5)).astype(np.float32), RNG.normal(size=(3, 5))


def dense_inverse(regularisation):
    rows = PHI.reshape(-1, 5).astype(np.float64)
    gram = rows.T @ rows
    return rows, np.linalg.inv(gram + regularisation * np.trace(gram) / 5 * np.eye(5))


@pytest.mark.parametrize("rows_at_once", [2, 1024])
def test_scores_and_leverages_equal_the_dense_inverse(rows_at_once, monkeypatch):
    monkeypatch.setattr(kernel_module, "_ROWS_AT_ONCE", rows_at_once)
    scores = kernel_scores(PHI, QUERIES, [1e-3, 2.0])
    assert scores.shape == (2, 3, 7, 2)
    for got, regularisation in zip(scores, [1e-3, 2.0]):
        rows, inverse = dense_inverse(regularisation)
        np.testing.assert_allclose(got.reshape(3, -1), QUERIES @ inverse @ rows.T, rtol=1e-10, atol=1e-12)
        expected = np.einsum("ri,ij,rj->r", rows, inverse, rows).reshape(7, 2)
        np.testing.assert_allclose(leverages(PHI, fit_kernel(PHI), regularisation), expected, rtol=1e-10)


def test_the_regularisation_is_relative_to_the_features():
    ours, scaled = (kernel_scores(phi, QUERIES, [0.1])[0] for phi in (PHI, 1000 * PHI))
    np.testing.assert_allclose(scaled, ours / 1000, rtol=1e-6)


def test_by_hand():
    # Phi^T Phi = diag(4, 1), of mean 2.5; lambda = 0.4 x 2.5 = 1.
    features = np.array([[2.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(kernel_scores(features, np.array([[1.0, 1.0]]), [0.4])[0, 0], [2 / 5, 1 / 2])
    np.testing.assert_allclose(leverages(features, fit_kernel(features), 0.4), [4 / 5, 1 / 2])


def test_more_numbers_than_examples_and_bad_input():
    wide = RNG.normal(size=(3, 40))
    kernel = fit_kernel(wide)
    assert isinstance(kernel, Kernel) and kernel.eigenvalues.min() >= 0
    assert np.isfinite(kernel_scores(wide, wide[:1], [1e-6], kernel)).all()
    with pytest.raises(ValueError, match="features of all 3 examples are zero"):
        fit_kernel(0 * wide)
    with pytest.raises(ValueError, match="regularisation is 0"):
        kernel_scores(wide, wide[:1], [0])
    for value in (np.nan, np.inf, 1e200):
        broken = wide.copy()
        broken[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            fit_kernel(broken)
    for queries in (wide[0], wide[:0], wide[:1, :39]):
        with pytest.raises(ValueError, match="query_features has shape"):
            kernel_scores(wide, queries, [1])
    with pytest.raises(ValueError, match="query_features has values that are NaN"):
        kernel_scores(wide, np.nan * wide[:1], [1])
    for values in (1.0, []):
        with pytest.raises(ValueError, match="regularisations is"):
            kernel_scores(wide, wide[:1], values)
