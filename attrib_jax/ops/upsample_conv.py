"""3x3 convolutions of images doubled by nearest neighbour, computed from the images before doubling.

Along one axis the doubled image holds ..., x[i-1], x[i], x[i], x[i+1], ... and a kernel (a, b, c) makes of it

    y[2i] = a x[i-1] + (b + c) x[i] = s x[i] + a (x[i-1] - x[i])
    y[2i+1] = (a + b) x[i] + c x[i+1] = s x[i] + c (x[i+1] - x[i]),    s = a + b + c,

three products for two results where the direct sum has six: Winograd's F(2, 3), in which one of four products is of the
difference of two equal inputs. Along both axes they are 9 of 36, each of all the image's pixels with one matrix.
Rounding errors are about twice those of the direct sum.
"""

import jax.numpy as jnp
from jax.lax import slice_in_dim

from attrib_jax.ops.bilinear import Form


def transform_kernel(kernel):
    """(3, 3, C, F) -> 9 of (C, F), those of the first row first."""

    def transform(a, b, c):
        return a, a + b + c, c

    columns = [transform(*(kernel[i, j] for j in range(3))) for i in range(3)]
    rows = [transform(*(columns[i][q] for i in range(3))) for q in range(3)]
    return tuple(rows[q][p] for p in range(3) for q in range(3))


def _transpose_transform(filters):
    """The transpose of `transform_kernel`."""

    def transpose(a, s, c):
        return a + s, s, c + s

    columns = [transpose(*filters[3 * p : 3 * p + 3]) for p in range(3)]
    rows = [transpose(*(columns[p][j] for p in range(3))) for j in range(3)]
    return jnp.stack([jnp.stack([rows[j][i] for j in range(3)]) for i in range(3)])


def convolve(x, *filters, transpose: bool = False):
    """(B, H, W, C) -> (B, 2 H, 2 W, F), or with `transpose` the transpose of that, which has the same products."""
    channels, features = filters[0].shape
    batch, height, width, _ = x.shape
    if transpose:
        result = sum(rows @ matrix.T for rows, matrix in zip(_differences(x), filters, strict=True))
        return result.reshape(batch, height // 2, width // 2, channels)

    pixels = x.reshape(-1, channels)
    products = [(pixels @ matrix).reshape(batch, height, width, features) for matrix in filters]
    columns = [_double(2, *products[3 * p : 3 * p + 3]) for p in range(3)]
    rows = [_double(1, *(columns[p][j] for p in range(3))) for j in range(2)]
    # (2 rows, 2 columns) of each pixel -> the image.
    result = jnp.stack([jnp.stack([rows[j][i] for j in range(2)], axis=3) for i in range(2)], axis=2)
    return result.reshape(batch, 2 * height, 2 * width, features)


def kernel_gradient(x, cotangent):
    """x (B, H, W, C) and cotangent (B, 2 H, 2 W, F) -> (3, 3, C, F)."""
    pixels = x.reshape(-1, x.shape[-1])
    return _transpose_transform([pixels.T @ rows for rows in _differences(cotangent)])


def _double(axis: int, a, s, c):
    """Products with a, s and c -> those of the even and of the odd places along `axis`."""
    return s + (_before(axis, a) - a), s + (_after(axis, c) - c)


def _differences(y):
    """The transpose of the sums: (B, 2 H, 2 W, F) -> 9 of (B H W, F)."""

    def transpose(axis, even, odd):
        return _after(axis, even) - even, even + odd, _before(axis, odd) - odd

    rows = transpose(1, y[:, 0::2], y[:, 1::2])
    places = [place for row in rows for place in transpose(2, row[:, :, 0::2], row[:, :, 1::2])]
    return [place.reshape(-1, y.shape[-1]) for place in places]


def _before(axis: int, x):
    """x[i - 1] at i, zero at the first."""
    return slice_in_dim(jnp.pad(x, [(int(at == axis), 0) for at in range(4)]), 0, x.shape[axis], axis=axis)


def _after(axis: int, x):
    """x[i + 1] at i, zero at the last."""
    return slice_in_dim(jnp.pad(x, [(0, int(at == axis)) for at in range(4)]), 1, x.shape[axis] + 1, axis=axis)


FORM = Form(
    lambda x, kernel, geometry: convolve(x, *transform_kernel(kernel)),
    lambda cotangent, kernel, geometry: convolve(cotangent, *transform_kernel(kernel), transpose=True),
    lambda x, cotangent, geometry: kernel_gradient(x, cotangent),
)
