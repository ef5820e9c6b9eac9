"""Compute precision of the UNet: how its weights and products are rounded, and what never is."""

from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice
from attrib_jax.core.weights import merge_weights, select_weights

# tensorfloat32 and bfloat16-products: float32 arrays, of which the device rounds the factors of products, to 10 and 7
# bits of mantissa, where that is faster: a TPU takes the first as three products of bfloat16 numbers and the second as
# one, a GPU takes both in TensorFloat-32, and a CPU in float32 (`jax.lax.Precision`).
# bfloat16: every weight but the cross-attention keys and values, which unlearning moves by less than a bfloat16 step;
# these and the text that they project stay float32.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16-products", "bfloat16")
_PRODUCTS = {"tensorfloat32": "tensorfloat32", "bfloat16-products": "bfloat16"}


def compute_dtype(precision: str) -> Any:
    """The dtype of the UNet's activations: None for that of the arrays as given."""
    check_choice("precision", precision, PRECISIONS)
    return jnp.bfloat16 if precision == "bfloat16" else None


def matmul_precision(precision: str) -> str:
    """What `jax.default_matmul_precision` takes for products of float32 numbers."""
    check_choice("precision", precision, PRECISIONS)
    return _PRODUCTS.get(precision, "highest")


def cast_params(params: Any, precision: str) -> Any:
    """UNet parameters in the dtypes of `precision`; unchanged for the float32 ones."""
    dtype = compute_dtype(precision)
    if dtype is None:
        return params
    kept, rest = select_weights(params, "cross-attn-kv")
    return merge_weights(kept, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), rest))
