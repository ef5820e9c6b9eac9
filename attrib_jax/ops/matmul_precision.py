"""The precision of float32 products, which JAX leaves to the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def float32_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its float32 products in float32, where the caller has not set `jax.default_matmul_precision`.

    By default a GPU takes them in TensorFloat-32 and a TPU in one pass of bfloat16, and a score is a small difference
    of two losses. Callers who want that speed say so:

        with jax.default_matmul_precision("tensorfloat32"):
            scores = score_dataset(...)
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        if jax.config.jax_default_matmul_precision is not None:
            return function(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run
