"""Convolutions of images, channels last: what a reader of a model sees, and which kernels can be prepared for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad

from attrib_jax.ops import cpu_conv, upsample_conv, winograd
from attrib_jax.ops.bilinear import BilinearConv, Form, Geometry, Pads, fold_into_batch, register, result_like

_NO_PADS = ((0, 0), (0, 0))
_SAME_3X3 = ((1, 1), (1, 1))


class TransformedKernel(NamedTuple):
    """A kernel with its Winograd transform, which CPUs take where the form fits instead of computing it at every call.

    Attributes:
      kernel: (3, 3, C, F); it comes first, as Flax compares the shape of a parameter's first leaf with its
        initialiser's.
      filters: four of (4, C, F), see `winograd.transform_kernel`.
    """

    kernel: jax.Array
    filters: tuple[jax.Array, ...]


def conv2d(x: jax.Array, kernel: jax.Array | TransformedKernel, stride: int = 1, padding: Pads = _NO_PADS) -> jax.Array:
    """2-D convolution (cross-correlation, as in deep learning) of (B, H, W, C) -> (B, H', W', F), without bias.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C, F), or a `TransformedKernel` of `prepare_kernels`, which has no derivative.
      stride: step in both directions.
      padding: zeros added on each side, ((top, bottom), (left, right)).

    Returns:
      In the promoted dtype of x and kernel.
    """
    filters, kernel = _split(kernel)
    x, kernel = _promote(x, kernel)
    if (kernel.shape[:2], stride, padding) == ((1, 1), 1, _NO_PADS):
        return x @ kernel[0, 0]
    sizes = zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
    out_size = tuple((extent + sum(pads) - size) // stride + 1 for extent, pads, size in sizes)
    geometry = _geometry(x, kernel, out_size, stride, padding)
    if filters and winograd.fits(geometry, kernel.shape[2], kernel.shape[3], x.dtype):
        return _prepared.bind(x, kernel, *filters, geometry=geometry, transpose=False)
    return _conv2d(x, kernel, geometry)


def upsample_conv2d(
    x: jax.Array, kernel: jax.Array | TransformedKernel, size: tuple[int, int] | None = None
) -> jax.Array:
    """`conv2d` by a 3x3 kernel, padding 1, of x doubled by nearest neighbour and cut to `size` (H', W').

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, C, F).
      size: 2 H or 2 H - 1 and 2 W or 2 W - 1, for which the cut gives what torch's nearest interpolation gives
        (`jax.image.resize` samples at pixel centres and differs); (2 H, 2 W) if None.

    Returns:
      (B, H', W', F).
    """
    plain = _split(kernel)[1]
    doubled = tuple(2 * extent for extent in x.shape[1:3])
    # The dtype and channels for which the form of a CPU is fast. It is not prepared: its transform is cheap sums.
    fits = min(plain.shape[2:]) >= winograd.MIN_CHANNELS and x.dtype == plain.dtype == jnp.float32
    if fits and tuple(size or doubled) == doubled:
        return _upsample_conv2d(x, plain, _geometry(x, plain, doubled, 1, _SAME_3X3))
    height, width = size or doubled
    return conv2d(_double(x)[:, :height, :width], kernel, padding=_SAME_3X3)


def prepare_kernels(params: Any, platform: str) -> Any:
    """`params` in which every kernel that has a faster prepared form on `platform` is a `TransformedKernel`.

    For programs that run many times on few examples with the same weights, such as the Fisher information's: on a CPU
    the transforms took an eighth of its time. Results stay the same. The transforms take memory, 16/9 of the kernels;
    on other platforms than "cpu" there are none and `params` is returned as it is.

    Args:
      params: pytree of weights that are not differentiated.
      platform: platform of the devices that run the program, such as "cpu", "cuda" or "tpu".
    """
    if platform != "cpu":
        return params

    def prepare(leaf):
        is_conv = leaf.ndim == 4 and leaf.shape[:2] == (3, 3) and leaf.dtype == jnp.float32
        if not is_conv or min(leaf.shape[2:]) < winograd.MIN_CHANNELS:
            return leaf
        return TransformedKernel(leaf, _transform_kernel(leaf))

    return jax.tree.map(prepare, params)


_transform_kernel = jax.jit(winograd.transform_kernel)


def _split(kernel) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The filters, if there are any, and the kernel."""
    return (kernel.filters, kernel.kernel) if isinstance(kernel, TransformedKernel) else ((), kernel)


def _promote(*arrays):
    dtype = jnp.result_type(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]


def _geometry(x, kernel, out_size, stride, padding) -> Geometry:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return Geometry(x.shape[1:3], out_size, kernel.shape[:2], stride, padding, precision)


def _double(x):
    """(B, H, W, C) -> (B, 2 H, 2 W, C), each pixel four times."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


_conv2d = BilinearConv("conv2d", cpu_conv.DIRECT, cpu_conv.choose_form)
_upsample_conv2d = BilinearConv(
    "upsample_conv2d",
    Form(lambda x, kernel, geometry: cpu_conv.direct(_double(x), kernel, geometry)),
    lambda *_: upsample_conv.FORM,
)

# The convolution, or with `transpose` its input gradient, of images, a kernel and the kernel's filters: by the filters
# on CPUs, by the kernel elsewhere. Linear in the images alone.
_prepared = Primitive("conv2d_prepared")


def _prepared_shape(x, kernel, *filters, geometry, transpose):
    size, features = (geometry.in_size, kernel.shape[2]) if transpose else (geometry.out_size, kernel.shape[3])
    return result_like(x, (x.shape[0], *size, features))


def _prepared_batch(arrays, axes, **static):
    if any(axis is not None for axis in axes[1:]):
        raise TypeError("vmap over a TransformedKernel is not supported: map over the kernels themselves")
    return fold_into_batch(lambda x: _prepared.bind(x, *arrays[1:], **static), arrays[0], axes[0])


def _prepared_jvp(primals, tangents, **static):
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[1:]):
        raise TypeError("a TransformedKernel has no derivative: give the convolution the kernel itself")
    x, *weights = primals
    result = _prepared.bind(x, *weights, **static)
    if isinstance(tangents[0], ad.Zero):
        return result, ad.Zero.from_primal_value(result)
    return result, _prepared.bind(tangents[0], *weights, **static)


def _prepared_transpose(cotangent, x, *weights, geometry, transpose):
    return _prepared.bind(cotangent, *weights, geometry=geometry, transpose=not transpose), *(None for _ in weights)


def _by_kernel(x, kernel, *filters, geometry, transpose):
    with jax.default_matmul_precision(geometry.precision):
        if not transpose:
            return cpu_conv.direct(x, kernel, geometry)
        image = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[2]), x.dtype)
        return jax.linear_transpose(lambda image: cpu_conv.direct(image, kernel, geometry), image)(x)[0]


def _by_filters(x, kernel, *filters, geometry, transpose):
    with jax.default_matmul_precision(geometry.precision):
        return winograd.convolve(x, *filters, transpose=transpose)


ad.primitive_jvps[_prepared] = _prepared_jvp
ad.primitive_transposes[_prepared] = _prepared_transpose
register(_prepared, _prepared_shape, _prepared_batch, _by_kernel, _by_filters)
