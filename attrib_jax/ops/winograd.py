"""3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3), with gradients in the same form.

Each 2x2 tile of outputs is a function of 4x4 inputs: transformed by sums, multiplied position by position of the
transform (16 matrix products), and transformed back (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks,
2016): 2.25 times fewer products than the direct sum, with rounding errors about twice its own. Padding is zeros, one on
each side; height and width are even.

The input gradient is another such convolution, by the kernel rotated by 180 degrees with its channels exchanged.
"""

import jax.numpy as jnp
import numpy as np
from jax.lax import slice_in_dim

from attrib_jax.ops.bilinear import Form, Geometry

# From this number of pixels and of channels in and out on, the form is faster on a CPU than the direct sum.
_MIN_PIXELS = 16
MIN_CHANNELS = 32
# A kernel gradient over at most this many pixels is computed from patches: what the transform saves in products it
# loses in bytes.
_PATCH_PIXELS = 64
# The products of the input gradient have the filters on the left, up to this many pixels: few rows wait for the filters
# from memory, and these are then read in order. Their results' transposes cost more for many.
_FILTERS_FIRST_PIXELS = 256


def fits(geometry: Geometry, channels: int, features: int, dtype) -> bool:
    """Whether the form computes a convolution and is fast: half precision would lose digits in the transforms."""
    (height, width), rest = geometry.in_size, (geometry.kernel_size, geometry.stride, geometry.padding)
    return (
        rest == ((3, 3), 1, ((1, 1), (1, 1)))
        and min(channels, features) >= MIN_CHANNELS
        and height * width >= _MIN_PIXELS
        and height % 2 == width % 2 == 0
        and dtype == jnp.float32
    )


def kernel_gradient(x, cotangent):
    """x (B, H, W, C) and cotangent (B, H, W, F) -> (3, 3, C, F): the transpose of the forward form, by products."""
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


def transform_kernel(kernel):
    """(3, 3, C, F) -> four of (4, C, F): down each column of the kernel first, then along the four rows it makes.

    The transform is 16/9 as large as the kernel.
    """

    def transform(a, b, c):
        return a, 0.5 * (a + c + b), 0.5 * (a + c - b), c

    rows = zip(*(transform(*(kernel[i, j] for i in range(3))) for j in range(3)))
    return tuple(jnp.stack(transform(*row)) for row in rows)


def convolve(x, *filters, transpose: bool = False):
    """Convolves x by the four of `transform_kernel`, (B, H, W, C) -> (B, H, W, F); with `transpose` from F to C.

    The transpose is the convolution by the kernel rotated by 180 degrees, with its channels exchanged. That kernel's
    transform holds the same numbers, its first and last places exchanged. So the places of the inputs are exchanged,
    which are fewer.
    """
    places = (3, 1, 2, 0) if transpose else range(4)
    batch, height, width, _ = x.shape
    filters_first = transpose and batch * height * width <= _FILTERS_FIRST_PIXELS

    bands = _transform(*_inputs_along(1, _pad(x)))
    halves: list = [None] * 4
    for place, row in zip(places, filters):
        columns = _transform(*_inputs_along(2, bands[place]))
        tiles = _stack_tiles([columns[position] for position in places])
        if filters_first:
            products = jnp.einsum("pcf,ptf->pct", row, tiles)
        else:
            products = jnp.einsum("ptf,pcf->ptc" if transpose else "ptc,pcf->ptf", tiles, row)
        halves[place] = _transform_back(*(products[position] for position in places))
    columns = [_transform_back(*(half[j] for half in halves)) for j in range(2)]
    return (_from_rows if filters_first else _from_columns)(columns, batch, height // 2, width // 2)


def _from_columns(places, batch, height, width):
    """Results at the two columns of the two rows of every tile, each (tiles, F) -> (batch, 2 height, 2 width, F)."""
    result = jnp.stack([jnp.stack([column[i] for column in places], axis=1) for i in range(2)], axis=1)
    result = jnp.swapaxes(result.reshape(batch, height, width, 2, 2, -1), 2, 3)
    return result.reshape(batch, 2 * height, 2 * width, -1)


def _from_rows(places, batch, height, width):
    """As `_from_columns`, each (F, tiles)."""
    result = jnp.stack([jnp.stack([column[i] for column in places]) for i in range(2)])
    result = result.reshape(2, 2, -1, batch, height, width).transpose(3, 4, 0, 5, 1, 2)
    return result.reshape(batch, 2 * height, 2 * width, -1)


def _pad(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _inputs_along(axis: int, padded):
    """The four places along the rows (1) or columns (2) of every tile's inputs, each half as long as the image."""
    extent = padded.shape[axis] - 2
    return (slice_in_dim(padded, i, i + extent - 1, 2, axis) for i in range(4))


def _transform(a, b, c, d):
    return a - c, b + c, c - b, b - d


def _transform_back(a, b, c, d):
    return a + b + c, b - c - d


def _stack_tiles(positions):
    """Four of (B, H / 2, W / 2, C) -> (4, tiles, C)."""
    return jnp.stack([position.reshape(-1, position.shape[-1]) for position in positions])


FORM = Form(
    lambda x, kernel, geometry: convolve(x, *transform_kernel(kernel)),
    lambda cotangent, kernel, geometry: convolve(cotangent, *transform_kernel(kernel), transpose=True),
    lambda x, cotangent, geometry: kernel_gradient(x, cotangent),
)
