"""The denoiser as one object: a Flax module with its compute precision, or a plain function behind the same methods."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice
from attrib_jax.core.weights import WEIGHT_SUBSETS, Params, flatten_names, unflatten_names
from attrib_jax.models.projected_text import ProjectedWeights, text_rows
from attrib_jax.models.unet import TEXT_KERNELS, UNet2DConditionModel
from attrib_jax.ops.shards import call_with_whole, has_shards

# How the UNet's weights and products are rounded, and what never is.
# tensorfloat32 and bfloat16-products: float32 arrays, of which the device rounds the factors of products, to 10 and 7
# bits of mantissa, where that is faster: a TPU takes the first as three products of bfloat16 numbers and the second as
# one, a GPU takes both in TensorFloat-32, and a CPU in float32 (`jax.lax.Precision`).
# bfloat16: every weight but the cross-attention keys and values and the factors of a LoRA, which unlearning moves by
# less than a bfloat16 step; these, and the text that the former project, stay float32.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16-products", "bfloat16")
_KEPT_FLOAT32 = re.compile("|".join(WEIGHT_SUBSETS[subset] for subset in ("cross-attn-kv", "lora")))
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
    flat = flatten_names(params)
    return unflatten_names(
        {name: leaf if _KEPT_FLOAT32.fullmatch(name) else _cast(leaf, dtype) for name, leaf in flat.items()}
    )


def _cast(leaf: Any, dtype: Any) -> Any:
    # A leaf of the parameters may be a `Shard`.
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), leaf)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A denoiser as the losses and samplers call it; equal ones find the same compiled programs.

    Attributes:
      module: Flax module whose `apply({"params": params}, latents (B, h, w, c), timesteps (B,) or (), conditioning)`
        returns (B, h, w, c), where the leaves of `conditioning` have a leading axis B, or 1 for one that all share.
      precision: compute precision of the forward pass, one of `PRECISIONS`; the parameters go through its
        `cast_params` first.

    Raises:
      ValueError: unknown `precision`.
    """

    module: Any
    precision: str = "float32"

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)

    def __call__(self, params: Params, noisy: jax.Array, timestep: jax.Array, conditioning: Any) -> jax.Array:
        """The prediction for one example: noisy latents (h, w, c), timestep () and its conditioning -> (h, w, c)."""
        return self.batched(params, noisy[None], timestep, jax.tree.map(lambda leaf: leaf[None], conditioning))[0]

    def batched(self, params: Params, noisy: jax.Array, timesteps: jax.Array, conditioning: Any) -> jax.Array:
        """The predictions for a batch -> (B, h, w, c).

        Args:
          params: nested dict of the module's parameters; each an array or, within a program, a `Shard` of one.
          noisy: (B, h, w, c) noisy latents.
          timesteps: (B,), or () for one timestep.
          conditioning: pytree whose leaves have a leading axis B, or 1 for one text for all latents: what the model
            computes from the text alone, such as its keys and values, is then computed once.
        """
        if has_shards(params):
            return call_with_whole(self.batched, params, noisy, timesteps, conditioning)
        dtype = compute_dtype(self.precision)
        # Only what the model reads: the target of the loss is made from the latents and is not rounded. The text is
        # projected in float32 by weights that stay float32.
        noisy = noisy if dtype is None else noisy.astype(dtype)
        return self.module.apply({"params": params}, noisy, timesteps, conditioning)

    def project_text(self, selected: Params, conditioning: Any) -> ProjectedWeights:
        """`selected` with each kernel that projects the text replaced by the projection `text @ kernel` (..., L, F).

        Only for modules that accept projections in their conditioning (`UNet2DConditionModel`); otherwise all weights
        stay as they are.
        """
        kernels = TEXT_KERNELS if isinstance(self.module, UNet2DConditionModel) else ()
        flat = flatten_names(selected)
        projected = {name: text_rows(conditioning) @ leaf for name, leaf in flat.items() if name.endswith(kernels)}
        others = {name: leaf for name, leaf in flat.items() if name not in projected}
        return ProjectedWeights(unflatten_names(others), unflatten_names(projected))


@dataclasses.dataclass(frozen=True)
class FunctionPredictor:
    """A function `predict(params, noisy (h, w, c), timestep (), conditioning)` with the methods of `Predictor`."""

    predict: Callable[..., jax.Array]

    def __call__(self, params: Params, noisy: jax.Array, timestep: jax.Array, conditioning: Any) -> jax.Array:
        if has_shards(params):
            return call_with_whole(self.predict, params, noisy, timestep, conditioning)
        return self.predict(params, noisy, timestep, conditioning)

    def batched(self, params: Params, noisy: jax.Array, timesteps: jax.Array, conditioning: Any) -> jax.Array:
        if has_shards(params):
            return call_with_whole(self.batched, params, noisy, timesteps, conditioning)
        if {len(leaf) for leaf in jax.tree.leaves(conditioning)} == {1}:
            shared = jax.tree.map(lambda leaf: leaf[0], conditioning)
            return jax.vmap(self.predict, in_axes=(None, 0, 0, None))(params, noisy, timesteps, shared)
        return jax.vmap(self.predict, in_axes=(None, 0, 0, 0))(params, noisy, timesteps, conditioning)

    def project_text(self, selected: Params, conditioning: Any) -> ProjectedWeights:
        return ProjectedWeights(selected, {})


def as_predictor(predict: Callable[..., jax.Array]) -> Predictor | FunctionPredictor:
    """`predict` itself if it is a predictor, else the function wrapped as one; one function gives equal predictors."""
    return predict if isinstance(predict, (Predictor, FunctionPredictor)) else FunctionPredictor(predict)


def predictor(unet: Any, precision: str = "float32") -> Predictor:
    """The denoiser `unet` (a Flax module) with the given compute precision as a `Predictor`.

    Call it as `predict(params, noisy (h, w, c), timestep (), text (L, d)) -> (h, w, c)`, map it with `jax.vmap`, or
    use `predict.batched`. Raises ValueError for an unknown `precision`.
    """
    return Predictor(unet, precision)
