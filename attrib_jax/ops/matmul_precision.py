"""Precision of float32 products, which JAX leaves to the device by default."""

import contextlib

import jax


def full_precision_matmuls() -> contextlib.AbstractContextManager:
    """Context in which float32 products are traced in full float32, unless `jax.default_matmul_precision` is set.

    By default a GPU computes them in TensorFloat-32 and a TPU in one pass of bfloat16, and a score is a small
    difference of two losses. Callers who want that speed set it:

        with jax.default_matmul_precision("tensorfloat32"):
            scores = score_dataset(...)
    """
    if jax.config.jax_default_matmul_precision is not None:  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")
