"""The kernel of projected gradients against numpy's inverse."""

import numpy as np
import pytest

from attrib_jax.attribution.kernel import Kernel, fit_kernel, kernel_scores, leverages

RNG = np.random.default_rng(0)
PHI, QUERIES = RNG.normal(size=(1030, 2, 5)).astype(np.float32), RNG.normal(size=(3, 5))


@pytest.mark.parametrize("count", [7, 1030])
@pytest.mark.parametrize("regularisation", [1e-3, 2.0])
def test_scores_and_leverages_equal_the_dense_inverse(count, regularisation):
    """Of a few examples, and of more than are read at once."""
    phi = PHI[:count]
    rows = phi.reshape(-1, 5).astype(np.float64)
    gram = rows.T @ rows
    inverse = np.linalg.inv(gram + regularisation * np.trace(gram) / 5 * np.eye(5))
    scores = kernel_scores(phi, QUERIES, [0.5, regularisation])
    assert scores.shape == (2, 3, count, 2)
    np.testing.assert_allclose(scores[1].reshape(3, -1), QUERIES @ inverse @ rows.T, rtol=1e-9, atol=1e-12)
    expected = np.einsum("ri,ij,rj->r", rows, inverse, rows).reshape(count, 2)
    np.testing.assert_allclose(leverages(phi, fit_kernel(phi), regularisation), expected, rtol=1e-9)


def test_the_regularisation_is_relative_to_the_features():
    ours, scaled = (kernel_scores(phi, QUERIES, [0.1])[0] for phi in (PHI[:7], 1000 * PHI[:7]))
    np.testing.assert_allclose(scaled, ours / 1000, rtol=1e-6)


def test_by_hand():
    # Phi^T Phi = diag(4, 1), of mean 2.5; lambda = 0.4 x 2.5 = 1.
    features = np.array([[2.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(kernel_scores(features, np.array([[1.0, 1.0]]), [0.4])[0, 0], [2 / 5, 1 / 2])
    np.testing.assert_allclose(leverages(features, fit_kernel(features), 0.4), [4 / 5, 1 / 2])


def test_more_numbers_than_examples():
    kernel = fit_kernel(WIDE)
    assert isinstance(kernel, Kernel) and kernel.eigenvalues.min() >= 0
    assert np.isfinite(kernel_scores(WIDE, WIDE[:1], [1e-6], kernel)).all()


WIDE = RNG.normal(size=(3, 40))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"features": 0 * WIDE}, "features of all 3 examples"),
        *(({"features": np.where(WIDE == WIDE[1, 2], value, WIDE)}, "features") for value in (np.nan, np.inf, 1e200)),
        *(({"query_features": queries}, "query_features") for queries in (WIDE[0], WIDE[:0], WIDE[:1, :39])),
        ({"query_features": np.nan * WIDE[:1]}, "query_features .*NaN"),
        ({"regularisations": [0]}, "regularisation is 0"),
        *(({"regularisations": values}, "regularisations is") for values in (1.0, [])),
    ],
)
def test_bad_input_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        kernel_scores(**{"features": WIDE, "query_features": WIDE[:1], "regularisations": [1]} | changes)
