"""Convolutions by a transform of their kernel, as operations of their own.

Such a form (winograd.py, doubled_conv.py) is sums before and after products of matrices. Its transposes are sums and
products of the same kind, but JAX would transpose the sums one by one, into padded arrays, which took 1.2 to 2 times as
long on a CPU. So a form is a primitive, with rules for both modes of differentiation and for `vmap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class TransformedKernel(NamedTuple):
    """A kernel with its transform, which the convolution then takes instead of making it again at every call.

    Attributes:
      kernel: (3, 3, C, F), for where the direct sum is taken after all; it comes first, as Flax compares the shape of
        a parameter's first leaf with its initialiser's.
      filters: its transform, as the form has it.
    """

    kernel: jax.Array
    filters: tuple[jax.Array, ...]


class FilteredConv:
    """A 3x3 convolution in the form that its functions give; a call takes pictures and a kernel.

    (B, H, W, C) and kernel (3, 3, C, F), both float32 or both float64 -> (B, scale * H, scale * W, F). A
    `TransformedKernel` of `transform` gives the same numbers; it has no derivative.
    """

    def __init__(
        self,
        name: str,
        transform: Callable[[jax.Array], tuple[jax.Array, ...]],
        apply: Callable[..., jax.Array],
        transpose_by_kernel: Callable[[jax.Array, jax.Array], jax.Array],
        scale: int = 1,
    ):
        """Registers the primitives.

        Args:
          name: of the primitive that takes a kernel; the one that takes filters has `_filtered` behind it.
          transform: kernel (3, 3, C, F) -> the filters, of which all have C and F as their last axes.
          apply: `apply(x, *filters, turned=False)`: the convolution, or `turned` its transpose by x, from F channels
            to C.
          transpose_by_kernel: `transpose_by_kernel(cotangent, x)`, its transpose by the kernel -> (3, 3, C, F).
          scale: the result's height and width by those of x.
        """
        self._transform, self._apply, self._scale = jax.jit(transform), apply, scale
        self._of_kernel, self._of_filters = Primitive(name), Primitive(f"{name}_filtered")
        self._register_of_kernel(transpose_by_kernel)
        self._register_of_filters()

    def __call__(self, x: jax.Array, kernel: jax.Array | TransformedKernel) -> jax.Array:
        if isinstance(kernel, TransformedKernel):
            return self._of_filters.bind(x, *kernel.filters, turned=False)
        return self._of_kernel.bind(x, kernel)

    def prepare(self, kernel: jax.Array) -> TransformedKernel:
        """(3, 3, C, F) -> the kernel and its transform."""
        return TransformedKernel(kernel, self._transform(kernel))

    def _convolve(self, x, kernel):
        return self._apply(x, *self._transform(kernel), turned=False)

    def _register_of_kernel(self, transpose_by_kernel):
        primitive = self._of_kernel

        def transpose_by_x(cotangent, x, kernel):
            return self._apply(cotangent, *self._transform(kernel), turned=True)

        def batch(arguments, axes):
            (x, kernel), (x_axis, kernel_axis) = arguments, axes
            if kernel_axis is not None:
                # A kernel for each example: no batch to fold into.
                return jax.vmap(self._convolve, in_axes=axes)(x, kernel), 0
            return _fold(lambda x: self(x, kernel), x, x_axis), 0

        primitive.def_impl(jax.jit(self._convolve))
        primitive.def_abstract_eval(lambda x, kernel: self._result(x, kernel, turned=False))
        ad.defbilinear(primitive, transpose_by_x, lambda cotangent, x, kernel: transpose_by_kernel(cotangent, x))
        batching.primitive_batchers[primitive] = batch
        mlir.register_lowering(primitive, mlir.lower_fun(self._convolve, multiple_results=False))

    def _register_of_filters(self):
        primitive = self._of_filters

        def jvp(primals, tangents, *, turned):
            x, *filters = primals
            if not all(isinstance(tangent, ad.Zero) for tangent in tangents[1:]):
                raise TypeError("a derivative by a transformed kernel; give the convolution the kernel itself")
            result, tangent = primitive.bind(x, *filters, turned=turned), tangents[0]
            if isinstance(tangent, ad.Zero):
                return result, ad.Zero.from_primal_value(result)
            return result, primitive.bind(tangent, *filters, turned=turned)

        def transpose(cotangent, x, *filters, turned):
            return primitive.bind(cotangent, *filters, turned=not turned), *(None for _ in filters)

        def batch(arguments, axes, *, turned):
            x, *filters = arguments
            if any(axis is not None for axis in axes[1:]):
                raise TypeError("vmap over transformed kernels; map over the kernels themselves")
            return _fold(lambda x: primitive.bind(x, *filters, turned=turned), x, axes[0]), 0

        primitive.def_impl(jax.jit(self._apply, static_argnames="turned"))
        primitive.def_abstract_eval(lambda x, *filters, turned: self._result(x, filters[0], turned))
        ad.primitive_jvps[primitive] = jvp
        ad.primitive_transposes[primitive] = transpose
        batching.primitive_batchers[primitive] = batch
        mlir.register_lowering(primitive, mlir.lower_fun(self._apply, multiple_results=False))

    def _result(self, x, filters: Any, turned: bool):
        batch, height, width, _ = x.shape
        *_, channels, features = filters.shape
        if turned:
            return x.update(shape=(batch, height // self._scale, width // self._scale, channels))
        return x.update(shape=(batch, height * self._scale, width * self._scale, features))


def _fold(function, x, axis):
    """Maps `function` over an axis of x as one batch -> the result, mapped over its first axis."""
    x = jnp.moveaxis(x, axis, 0)
    result = function(x.reshape(-1, *x.shape[2:]))
    return result.reshape(*x.shape[:2], *result.shape[1:])
