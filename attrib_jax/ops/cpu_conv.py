"""Convolutions on CPUs: the form that is fastest for a shape. XLA's own runs at a few GFLOP/s for some of them.

Where products with a matrix of patches, or one product shifted to the places of the kernel, are as many as the direct
sum's, they run at over a hundred GFLOP/s, and so do their transposes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.ops import winograd
from attrib_jax.ops.bilinear import Form, Geometry

# At or below this many output pixels XLA's convolution is slow. That of a strided one has a slow gradient, too, and
# that for more pixels, and so has one of few channels in or out, for any number of pixels (docs/PERFORMANCE.md).
_FEW_PIXELS = 4
_FEW_STRIDED_PIXELS = 64


def choose_form(geometry: Geometry, channels: int, features: int, dtype: jnp.dtype) -> Form:
    """The form for a kernel (h, w, channels, features)."""
    pixels, entries = math.prod(geometry.out_size), math.prod(geometry.kernel_size)
    if winograd.fits(geometry, channels, features, dtype):
        return winograd.FORM
    strided = geometry.stride > 1 and pixels <= _FEW_STRIDED_PIXELS
    if pixels <= _FEW_PIXELS or strided or entries * channels <= features:
        return PATCHES
    # Half precision would round each of the shifted terms.
    if entries * features <= channels and geometry.stride == 1 and jnp.finfo(dtype).bits >= 32:
        return SHIFTS
    return DIRECT


def direct(x, kernel, geometry: Geometry):
    """XLA's convolution."""
    strides, layout = (geometry.stride,) * 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, geometry.padding, dimension_numbers=layout)


def patches(x, kernel, geometry: Geometry):
    """The convolution as a product of what each output pixel depends on, (B, H', W', h w C), with the kernel."""
    padded = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    rows = jnp.concatenate([padded[place] for place in _places(geometry)], axis=-1)
    return rows @ kernel.reshape(-1, kernel.shape[-1])


def shifts(x, kernel, geometry: Geometry):
    """The convolution as one product for all entries of the kernel, whose parts are shifted and added."""
    columns = jnp.moveaxis(kernel, 2, 0).reshape(x.shape[-1], -1)
    # Padded after the product, of fewer numbers. The transpose of `split` is a concatenation, that of slices a sum.
    padded = jnp.pad(x @ columns, ((0, 0), *geometry.padding, (0, 0)))
    parts = jnp.split(padded, math.prod(geometry.kernel_size), axis=-1)
    return sum(part[place] for part, place in zip(parts, _places(geometry)))


def _places(geometry: Geometry) -> list[tuple[slice, ...]]:
    """For each entry of the kernel, row by row, what it reads of the padded input."""
    stride, (height, width) = geometry.stride, geometry.kernel_size
    rows, columns = (stride * (extent - 1) + 1 for extent in geometry.out_size)
    return [np.s_[:, i : i + rows : stride, j : j + columns : stride] for i in range(height) for j in range(width)]


DIRECT, PATCHES, SHIFTS = Form(direct), Form(patches), Form(shifts)
