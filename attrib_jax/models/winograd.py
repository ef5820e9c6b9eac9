"""3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3), with derivatives in the same form.

The transpose of such a convolution is another one, by the turned kernel. Transposing the sums of the forward form gives
it too, but as sums into padded arrays, which took 1.2 to 2 times as long on a CPU. So the convolution is a primitive of
its own, with rules for both modes of differentiation and for `vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# A kernel's derivative over at most this many pixels is taken from patches: what the transform saves in products it
# loses in bytes.
_PATCH_PIXELS = 64


class WinogradKernel(NamedTuple):
    """A kernel with its transform, which the convolution then takes instead of making it again at every call.

    Attributes:
      kernel: (3, 3, C, F), for where the direct sum is taken after all; it comes first, as Flax compares the shape of
        a parameter's first leaf with its initialiser's.
      filters: four of (4, C, F), one a row of the transform.
    """

    kernel: jax.Array
    filters: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def transform_kernel(kernel: jax.Array) -> WinogradKernel:
    """(3, 3, C, F) -> the kernel and its transform, 16/9 as large again."""
    return WinogradKernel(kernel, _transform_kernel(kernel))


def winograd_conv(x, kernel):
    """A 3x3 convolution with zero padding, 2.25 times fewer products than the direct sum.

    (B, H, W, C) with H and W even, and kernel (3, 3, C, F), both float32 or both float64 -> (B, H, W, F). Each 2x2 tile
    of outputs is a function of 4x4 inputs: transformed by sums, multiplied position by position of the transform (16
    matrix products), and transformed back (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016).
    Its rounding errors are about twice those of the direct sum. A `WinogradKernel` gives the same numbers; it has no
    derivative.
    """
    if isinstance(kernel, WinogradKernel):
        return _filtered_p.bind(x, *kernel.filters, turned=False)
    return _winograd_p.bind(x, kernel)


def _convolve(x, kernel):
    return _apply(x, *_transform_kernel(kernel), turned=False)


def _transpose_by_x(cotangent, x, kernel):
    return _apply(cotangent, *_transform_kernel(kernel), turned=True)


def _transpose_by_kernel(cotangent, x, kernel):
    """(B, H, W, F) and x (B, H, W, C) -> (3, 3, C, F): the transpose of the forward form, product by product."""
    batch, height, width, channels = x.shape
    features = cotangent.shape[-1]
    padded = _pad(x)
    if batch * height * width <= _PATCH_PIXELS:
        patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(patches, axis=-1).reshape(-1, 9 * channels)
        return (patches.T @ cotangent.reshape(-1, features)).reshape(3, 3, channels, features)

    def transpose_back(a, b):
        return a, a + b, a - b, -b

    rows = transpose_back(cotangent[:, 0::2], cotangent[:, 1::2])
    products = []
    for band, row in zip(_transform(*_inputs_along(1, padded)), rows):
        tiles = _stack_tiles(_transform(*_inputs_along(2, band)))
        cotangents = _stack_tiles(transpose_back(row[:, :, 0::2], row[:, :, 1::2]))
        products.append(jnp.einsum("ptc,ptf->pcf", tiles, cotangents))
    a, b, c, d = products
    columns = jnp.stack([a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d])
    # As a product of matrices: sums of slices, stacked, took several times as long.
    transform = np.array([[1, 0.5, 0.5, 0], [0, 0.5, -0.5, 0], [0, 0.5, 0.5, 1]], columns.dtype)
    return jnp.einsum("jp,ipcf->ijcf", transform, columns)


@jax.jit
def _transform_kernel(kernel):
    """(3, 3, C, F) -> four of (4, C, F): down each column of the kernel first, then along the four rows it makes."""

    def transform(a, b, c):
        return a, 0.5 * (a + c + b), 0.5 * (a + c - b), c

    rows = zip(*(transform(*(kernel[i, j] for i in range(3))) for j in range(3)))
    return tuple(jnp.stack(transform(*row)) for row in rows)


def _apply(x, *filters, turned: bool):
    """Convolves `x` by the four of `_transform_kernel`: (B, H, W, C) -> (B, H, W, F), or `turned` from F to C.

    The turned convolution is the transpose: by the kernel turned by half a circle, with its channels exchanged. That
    kernel's transform holds the same numbers, its first and last places exchanged. So the places of the inputs are
    exchanged, which are fewer.
    """
    places, product = ((3, 1, 2, 0), "ptf,pcf->ptc") if turned else (range(4), "ptc,pcf->ptf")
    batch, height, width, _ = x.shape

    bands = _transform(*_inputs_along(1, _pad(x)))
    halves = [None] * 4
    for place, row in zip(places, filters):
        columns = _transform(*_inputs_along(2, bands[place]))
        tiles = _stack_tiles([columns[position] for position in places])
        products = jnp.einsum(product, tiles, row)
        halves[place] = _transform_back(*(products[position] for position in places))
    columns = [_transform_back(*(half[j] for half in halves)) for j in range(2)]
    # (2 rows, 2 columns) of each tile -> the picture.
    result = jnp.stack([jnp.stack([columns[j][i] for j in range(2)], axis=1) for i in range(2)], axis=1)
    result = result.reshape(batch, height // 2, width // 2, 2, 2, -1)
    return jnp.swapaxes(result, 2, 3).reshape(batch, height, width, -1)


def _pad(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _inputs_along(axis: int, padded):
    """The four places along the rows (1) or columns (2) of every tile's inputs, each half as long as the picture."""
    extent = padded.shape[axis] - 2
    return (jax.lax.slice_in_dim(padded, i, i + extent - 1, 2, axis) for i in range(4))


def _transform(a, b, c, d):
    return a - c, b + c, c - b, b - d


def _transform_back(a, b, c, d):
    return a + b + c, b - c - d


def _stack_tiles(positions):
    """Four of (B, H / 2, W / 2, C) -> (4, tiles, C)."""
    return jnp.stack([position.reshape(-1, position.shape[-1]) for position in positions])


def _batch(arguments, axes):
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    if kernel_axis is not None:
        # A kernel for each example: no batch to fold into.
        return jax.vmap(_convolve, in_axes=axes)(x, kernel), 0
    return _fold(lambda x: winograd_conv(x, kernel), x, x_axis)


def _batch_filtered(arguments, axes, *, turned):
    x, *filters = arguments
    if any(axis is not None for axis in axes[1:]):
        raise TypeError("vmap over transformed kernels; map over the kernels themselves")
    return _fold(lambda x: _filtered_p.bind(x, *filters, turned=turned), x, axes[0])


def _jvp_filtered(primals, tangents, *, turned):
    x, *filters = primals
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[1:]):
        raise TypeError("a derivative by a transformed kernel; give the convolution the kernel itself")

    def apply(x):
        return _filtered_p.bind(x, *filters, turned=turned)

    result, tangent = apply(x), tangents[0]
    return result, ad.Zero.from_primal_value(result) if isinstance(tangent, ad.Zero) else apply(tangent)


def _transpose_filtered(cotangent, x, *filters, turned):
    return _filtered_p.bind(cotangent, *filters, turned=not turned), None, None, None, None


def _fold(function, x, axis):
    """Maps `function` over an axis of x as one batch."""
    x = jnp.moveaxis(x, axis, 0)
    result = function(x.reshape(-1, *x.shape[2:]))
    return result.reshape(*x.shape[:2], *result.shape[1:]), 0


def _filtered_shape(x, *filters, turned):
    return x.update(shape=(*x.shape[:-1], filters[0].shape[1 if turned else 2]))


_winograd_p = Primitive("winograd_conv")
_winograd_p.def_impl(jax.jit(_convolve))
_winograd_p.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
ad.defbilinear(_winograd_p, _transpose_by_x, _transpose_by_kernel)
batching.primitive_batchers[_winograd_p] = _batch
mlir.register_lowering(_winograd_p, mlir.lower_fun(_convolve, multiple_results=False))

_filtered_p = Primitive("winograd_filtered")
_filtered_p.def_impl(jax.jit(_apply, static_argnames="turned"))
_filtered_p.def_abstract_eval(_filtered_shape)
ad.primitive_jvps[_filtered_p] = _jvp_filtered
ad.primitive_transposes[_filtered_p] = _transpose_filtered
batching.primitive_batchers[_filtered_p] = _batch_filtered
mlir.register_lowering(_filtered_p, mlir.lower_fun(_apply, multiple_results=False))
