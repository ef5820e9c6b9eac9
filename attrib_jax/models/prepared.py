"""What a program computes from the weights alone, once before many uses."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attrib_jax.core.weights import Params, flatten_names, merge_weights, unflatten_names
from attrib_jax.models.layers import Conv
from attrib_jax.ops.transform_conv import FilteredConv

# Name, shape and dtype of every leaf.
_Layout = tuple[tuple[str, tuple[int, ...], Any], ...]


def transform_kernels(
    predict: Callable[..., Any],
    selected: Params,
    rest: Params,
    latent_shape: tuple[int, ...],
    text_shape: tuple[int, int],
) -> Params:
    """`rest`, each kernel of a convolution that takes a transform of it a `TransformedKernel`; results stay the same.

    For programs that take few examples at a time: made anew for 8 pictures of 16x16 latents, the transforms took an
    eighth of the Fisher information's time on a CPU. They need memory, up to 16/9 of these kernels. Where no
    convolution takes one, such as on a GPU, `rest` comes back as it is.

    Args:
      predict: `predict(params, noisy latents, timestep, text)` for one example.
      selected, rest: the two halves of the parameters; only `rest` changes, as transforms have no derivative.
      latent_shape, text_shape: (h, w, c) and (L, d) of one example, whose arrays are float32.
    """
    if jax.default_backend() != "cpu":
        return rest
    flat = flatten_names(rest)
    if not any(leaf.shape[:2] == (3, 3) for leaf in flat.values()):
        return rest
    forms = _forms(predict, _layout(selected), _layout(rest), latent_shape, text_shape)
    return unflatten_names({name: forms[name].prepare(leaf) if name in forms else leaf for name, leaf in flat.items()})


def _layout(tree: Params) -> _Layout:
    return tuple((name, leaf.shape, leaf.dtype) for name, leaf in flatten_names(tree).items())


@functools.lru_cache(maxsize=16)
def _forms(predict, selected: _Layout, rest: _Layout, latent_shape, text_shape) -> dict[str, FilteredConv]:
    """Names of kernels -> the form of their convolution, from a trace of the model."""
    found = {}

    def visit(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Conv) and context.method_name == "__call__":
            form = module.filtered(*args, **kwargs)
            if form is not None:
                found["/".join((*module.path, "kernel"))] = form
        return call(*args, **kwargs)

    def run(*arguments):
        # A function of its own: a trace that JAX remembers would visit nothing.
        with nn.intercept_methods(visit):
            return predict(merge_weights(*arguments[:2]), *arguments[2:])

    weights = ({name: jax.ShapeDtypeStruct(*leaf) for name, *leaf in half} for half in (selected, rest))
    latents, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (latent_shape, text_shape))
    jax.eval_shape(run, *map(unflatten_names, weights), latents, jax.ShapeDtypeStruct((), jnp.int32), text)
    return found
