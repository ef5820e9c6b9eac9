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
# these and the text that they project stay float32. bfloat16-all: those too.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16-products", "bfloat16", "bfloat16-all")
_PRODUCTS = {"tensorfloat32": "tensorfloat32", "bfloat16-products": "bfloat16"}


def compute_dtype(precision: str) -> Any:
    """The dtype of the UNet's activations: None for that of the arrays as given."""
    check_choice("precision", precision, PRECISIONS)
    return jnp.bfloat16 if precision in ("bfloat16", "bfloat16-all") else None


def matmul_precision(precision: str) -> str:
    """What `jax.default_matmul_precision` takes for products of float32 numbers."""
    check_choice("precision", precision, PRECISIONS)
    return _PRODUCTS.get(precision, "highest")


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


def cast_inputs(noisy_latents: jax.Array, text: jax.Array, precision: str) -> tuple[jax.Array, jax.Array]:
    """Noisy latents and text states in the dtypes that the UNet takes them in; unchanged for the float32 precisions.

    The loss is not to be rounded, so cast what the UNet reads and not what noise and target are made from.
    """
    dtype = compute_dtype(precision)
    if dtype is None:
        return noisy_latents, text
    if precision == "bfloat16-all":
        text = jax.tree.map(lambda states: states.astype(dtype), text)
    return noisy_latents.astype(dtype), text
