"""3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3), with derivatives in the same form.

The transpose of such a convolution is another one, by the turned kernel. Transposing the sums of the forward form gives
it too, but as sums into padded arrays, which took 1.2 to 2 times as long on a CPU. So the convolution is a primitive of
its own, with rules for both modes of differentiation and for `vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# A kernel's derivative over at most this many pixels is taken from patches: what the transform saves in products it
# loses in bytes.
_PATCH_PIXELS = 64


def winograd_conv(x, kernel):
    """A 3x3 convolution with zero padding, 2.25 times fewer products than the direct sum.

    (B, H, W, C) with H and W even, and kernel (3, 3, C, F), both float32 or both float64 -> (B, H, W, F). Each 2x2 tile
    of outputs is a function of 4x4 inputs: transformed by sums, multiplied position by position of the transform (16
    matrix products), and transformed back (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016).
    Its rounding errors are about twice those of the direct sum.
    """
    return _winograd_p.bind(x, kernel)


def _convolve(x, kernel):
    return _filter([[kernel[i, j] for j in range(3)] for i in range(3)], x, "ptc,pcf->ptf")


def _transpose_by_x(cotangent, x, kernel):
    """(B, H, W, F) -> (B, H, W, C): the kernel turned by half a circle, its channels exchanged by the product."""
    return _filter([[kernel[i, j] for j in (2, 1, 0)] for i in (2, 1, 0)], cotangent, "ptf,pcf->ptc")


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


def _filter(taps, x, product: str):
    """`taps` are the nine (C, F) matrices of a kernel; `product` multiplies tiles of `x` with them, for 4 positions."""
    batch, height, width, _ = x.shape

    def transform_filter(a, b, c):
        return a, 0.5 * (a + c + b), 0.5 * (a + c - b), c

    def transform_back(a, b, c, d):
        return a + b + c, b - c - d

    # Down each column of the kernel first, then along the four rows that this makes.
    filters = zip(*(transform_filter(*column) for column in zip(*taps)))
    halves = []
    for band, filter_row in zip(_transform(*_inputs_along(1, _pad(x))), filters):
        tiles = _stack_tiles(_transform(*_inputs_along(2, band)))
        halves.append(transform_back(*jnp.einsum(product, tiles, jnp.stack(transform_filter(*filter_row)))))
    columns = [transform_back(*(half[j] for half in halves)) for j in range(2)]
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


def _stack_tiles(positions):
    """Four of (B, H / 2, W / 2, C) -> (4, tiles, C)."""
    return jnp.stack([position.reshape(-1, position.shape[-1]) for position in positions])


def _batch(arguments, axes):
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    if kernel_axis is not None:
        # A kernel for each example: no batch to fold into.
        return jax.vmap(_convolve, in_axes=axes)(x, kernel), 0
    x = jnp.moveaxis(x, x_axis, 0)
    result = winograd_conv(x.reshape(-1, *x.shape[2:]), kernel)
    return result.reshape(*x.shape[:2], *result.shape[1:]), 0


_winograd_p = Primitive("winograd_conv")
_winograd_p.def_impl(jax.jit(_convolve))
_winograd_p.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
ad.defbilinear(_winograd_p, _transpose_by_x, _transpose_by_kernel)
batching.primitive_batchers[_winograd_p] = _batch
mlir.register_lowering(_winograd_p, mlir.lower_fun(_convolve, multiple_results=False))
