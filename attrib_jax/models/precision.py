"""Compute precision of the UNet: how its weights and products are rounded, and what never is."""

from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice
from attrib_jax.core.weights import merge_weights, select_weights

# bfloat16: every weight but the cross-attention keys and values, which unlearning moves by less than a bfloat16 step.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "bfloat16-all")


def compute_dtype(precision: str) -> Any:
    """The dtype that latents and text enter the UNet in, None to leave them as they are."""
    check_choice("precision", precision, PRECISIONS)
    return jnp.bfloat16 if precision.startswith("bfloat16") else None


def matmul_precision(precision: str) -> str:
    """What `jax.default_matmul_precision` takes for products of float32 numbers."""
    check_choice("precision", precision, PRECISIONS)
    return "tensorfloat32" if precision == "tensorfloat32" else "highest"


def cast_params(params: Any, precision: str) -> Any:
    """UNet parameters in the dtypes of `precision`; unchanged for the float32 ones."""
    dtype = compute_dtype(precision)
    if dtype is None:
        return params

    def cast(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    if precision == "bfloat16-all":
        return cast(params)
    kept, rest = select_weights(params, "cross-attn-kv")
    return merge_weights(kept, cast(rest))
