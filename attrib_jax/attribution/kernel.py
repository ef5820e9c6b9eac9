"""Scores from projected gradients: tau = phi(z_hat)^T (Phi^T Phi + lambda I)^-1 phi(z_i) (TRAK, Park et al. 2023).

All on the host in float64, block by block: features may lie on disk. One eigendecomposition of Phi^T Phi serves every
lambda, so that an evaluation can choose it on held-out queries.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core.checks import check_finite, check_positive

_ROWS_AT_ONCE = 1024


class Kernel(NamedTuple):
    """Phi^T Phi = V diag(w) V^T of features Phi, k numbers a row.

    Attributes:
      eigenvalues: (k,) float64, not negative.
      eigenvectors: (k, k) float64, V, one a column.
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    def damped(self, regularisation: float) -> np.ndarray:
        """w + lambda (k,), with lambda = regularisation x mean(w)."""
        check_positive("regularisation", regularisation)
        return self.eigenvalues + regularisation * self.eigenvalues.mean()


def fit_kernel(features: Any) -> Kernel:
    """The kernel of features (N, ..., k), an array or one on disk that takes slices; every (k,) in it is a row of Phi.

    Raises ValueError where one is NaN or infinite, or all are zero: there is then no scale for lambda.
    """
    width = features.shape[-1]
    gram = np.zeros((width, width))
    with np.errstate(over="ignore", invalid="ignore"):  # an error below names it
        for block in _blocks(features):
            gram += block.T @ block
    if not np.isfinite(gram).all():
        raise ValueError(
            f"features of the {features.shape[0]} examples have values that are NaN or infinite, or overflow when "
            "squared. Look for a damaged model, or compute them again."
        )
    if not np.trace(gram) > 0:
        raise ValueError(
            f"the features of all {features.shape[0]} examples are zero: the gradients vanish or underflow. Select "
            "other weights, or look for a damaged model."
        )
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    # Rounding leaves the smallest of a singular matrix a little below zero.
    return Kernel(np.maximum(eigenvalues, 0), eigenvectors)


def kernel_scores(
    features: Any, query_features: np.ndarray, regularisations: Sequence[float], kernel: Kernel | None = None
) -> np.ndarray:
    """tau of every row and query for a list of regularisations -> (len(regularisations), Q, N, ...) float64.

    Args:
      features: (N, ..., k), each (k,) a row of Phi.
      query_features: (Q, k), phi(z_hat) a row.
      regularisations: each lambda in units of the mean eigenvalue of Phi^T Phi. An absolute lambda, as the papers give
        it (5e2 for D-TRAK), depends on k, on the number of examples and on the scale of the gradients; this one does
        not: scores keep their order when all features are multiplied by one number.
      kernel: kernel of `features`, if the caller has it; fitted if None.

    Raises ValueError for a regularisation that is not positive, query features of another shape or that are not
    finite, or features that `fit_kernel` refuses.
    """
    query_features = np.asarray(query_features, np.float64)
    if query_features.ndim != 2 or not len(query_features) or query_features.shape[1] != features.shape[-1]:
        raise ValueError(
            f"query_features has shape {query_features.shape}; expected (Q, {features.shape[-1]}), Q of 1 or more and "
            "as wide as features"
        )
    check_finite("query_features", query_features)
    if np.ndim(regularisations) != 1 or not len(regularisations):
        raise ValueError(f"regularisations is {regularisations!r}; expected a list of one or more numbers")
    kernel = fit_kernel(features) if kernel is None else kernel
    damped = [kernel.damped(value) for value in regularisations]
    # Vector by vector: in a product of matrices the last bits of a query would depend on the queries beside it.
    rotated = [query @ kernel.eigenvectors for query in query_features]
    solved = [kernel.eigenvectors @ (query / weights) for weights in damped for query in rotated]
    parts = [[block @ direction for direction in solved] for block in _blocks(features)]
    return np.concatenate(parts, axis=1).reshape(len(damped), len(rotated), *features.shape[:-1])


def leverages(features: Any, kernel: Kernel, regularisation: float) -> np.ndarray:
    """h_i = phi_i^T (Phi^T Phi + lambda I)^-1 phi_i of every row -> (N, ...) float64, from 0 to 1."""
    weights = 1 / kernel.damped(regularisation)
    parts = [np.square(block @ kernel.eigenvectors) @ weights for block in _blocks(features)]
    return np.concatenate(parts).reshape(features.shape[:-1])


def _blocks(features: Any) -> Iterator[np.ndarray]:
    for first in range(0, features.shape[0], _ROWS_AT_ONCE):
        block = np.asarray(features[first : first + _ROWS_AT_ONCE], np.float64)
        yield block.reshape(-1, block.shape[-1])
