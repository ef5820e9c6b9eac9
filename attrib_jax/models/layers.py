"""Layers that the UNet and the autoencoder share, named as their diffusers counterparts.

Arrays are channels last. Every layer computes in the promoted dtype of its input and its parameters, so float64
parameters (with `jax_enable_x64`) give a float64 forward, and bfloat16 latents and parameters a bfloat16 one, in which
norms and softmax are float32 still. Parameter names follow diffusers' module names, so that the
converter is a renaming and a transposition.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from attrib_jax.ops.barrier import materialise_cotangent
from attrib_jax.ops.transform_conv import FilteredConv, TransformedKernel
from attrib_jax.ops.upsample_conv import doubled_conv
from attrib_jax.ops.winograd import winograd_conv

# At or below this many output pixels, XLA's CPU convolution runs at a few GFLOP/s; as patches times a matrix the same
# product runs at over a hundred. A strided one has a slow derivative, too, and that for more pixels, and so has one of
# few channels in or out, for any number of pixels. From the third number of pixels and that of channels on, Winograd's
# form is faster still ("Speed" in BUILD_NOTES.md).
_MATMUL_CONV_PIXELS = 4
_MATMUL_STRIDED_CONV_PIXELS = 64
_WINOGRAD_PIXELS = 16
_FILTERED_CHANNELS = 32
# Logits of attention that one call holds; above, it goes through the queries in blocks. Stable Diffusion's first level
# has 134 million for a picture of 512 pixels.
_LOGITS_AT_ONCE = 2**24


class Conv(nn.Module):
    """2-D convolution of (B, H, W, C) with an HWIO kernel, `padding` zeros as ((top, bottom), (left, right))."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x, doubled_to: tuple[int, int] | None = None):
        """Convolves `x`, or with `doubled_to` (H, W) x doubled by nearest neighbour and cut to that size."""
        size = self.kernel_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        prepared, kernel = (kernel, kernel.kernel) if isinstance(kernel, TransformedKernel) else (None, kernel)
        x, kernel, bias = promote_dtype(x, kernel, bias)
        form = self.filtered(x, doubled_to)
        if form is not None:
            return form(x, prepared or kernel) + bias
        if doubled_to is not None:
            x = _double(x)[:, : doubled_to[0], : doubled_to[1]]
        if (size, self.stride, self.padding) == (1, 1, ((0, 0), (0, 0))):
            return x @ kernel[0, 0] + bias
        if self._as_patches(x):
            return self._patches(x) @ kernel.reshape(-1, self.features) + bias
        if self._as_shifts(x):
            return self._shifts(x, kernel) + bias
        strides = (self.stride, self.stride)
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=layout) + bias

    def filtered(self, x, doubled_to: tuple[int, int] | None = None) -> FilteredConv | None:
        """The form by a transform of the kernel that a call with the promoted `x` takes, None for no such form."""
        # On GPUs cuDNN chooses the algorithm. Half precision would lose digits in the transforms, and float64 is for
        # references.
        if (
            (self.kernel_size, self.stride, self.padding) != (3, 1, ((1, 1), (1, 1)))
            or min(x.shape[-1], self.features) < _FILTERED_CHANNELS
            or x.dtype != jnp.float32
            or jax.default_backend() != "cpu"
        ):
            return None
        _, height, width, _ = x.shape
        if doubled_to is not None:
            return doubled_conv if tuple(doubled_to) == (2 * height, 2 * width) else None
        return winograd_conv if height * width >= _WINOGRAD_PIXELS and height % 2 == width % 2 == 0 else None

    def _as_patches(self, x) -> bool:
        """Whether a product with patches is faster than the convolution, or its derivatives by far."""
        pixels = math.prod(self._output_size(x))
        if pixels <= _MATMUL_CONV_PIXELS:
            return True
        if jax.default_backend() != "cpu":
            return False
        strided = self.stride > 1 and pixels <= _MATMUL_STRIDED_CONV_PIXELS
        return strided or self.kernel_size**2 * x.shape[-1] <= self.features

    def _patches(self, x):
        """(B, H, W, C) -> what each output pixel is a function of, (B, H', W', size * size * C)."""
        padded = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        return jnp.concatenate([padded[place] for place in self._places(x)], axis=-1)

    def _as_shifts(self, x) -> bool:
        """As `_as_patches`, where the outputs are the few. Half precision would round each of the shifted terms."""
        few = self.kernel_size**2 * self.features <= x.shape[-1]
        return few and self.stride == 1 and jnp.finfo(x.dtype).bits >= 32 and jax.default_backend() == "cpu"

    def _shifts(self, x, kernel):
        """The convolution as one product for all places of the kernel, added up where they belong."""
        columns = jnp.moveaxis(kernel, 2, 0).reshape(x.shape[-1], -1)
        # Padded after the product, of fewer numbers. The transpose of `split` is a concatenation, that of slices a sum.
        padded = jnp.pad(x @ columns, ((0, 0), *self.padding, (0, 0)))
        parts = jnp.split(padded, self.kernel_size**2, axis=-1)
        return sum(part[place] for part, place in zip(parts, self._places(x)))

    def _places(self, x) -> list[tuple[slice, ...]]:
        """For each entry of the kernel, row by row, what it takes of the padded input."""
        rows, columns = (self.stride * (extent - 1) + 1 for extent in self._output_size(x))
        at = range(self.kernel_size)
        return [np.s_[:, i : i + rows : self.stride, j : j + columns : self.stride] for i in at for j in at]

    def _output_size(self, x) -> tuple[int, int]:
        return tuple(
            (extent + sum(pads) - self.kernel_size) // self.stride + 1
            for extent, pads in zip(x.shape[1:3], self.padding)
        )


def pointwise_conv(features: int, name: str | None) -> Conv:
    """A 1x1 convolution: a linear map of each pixel's channels, stored as diffusers stores it."""
    return Conv(features, kernel_size=1, padding=((0, 0), (0, 0)), name=name)


class GroupNorm(nn.Module):
    """Group normalisation over (..., C) with a two-pass variance, which keeps its digits when the mean is large."""

    num_groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x, scale, bias = promote_dtype(x, scale, bias)
        dtype, x = x.dtype, _at_least_float32(x)
        # Over the pixels first, then over the channels of each group: contiguous reductions, several times faster on a
        # CPU than one reduction over both.
        pixels = x.reshape(x.shape[0], -1, channels)
        centred = pixels - self._group_mean(jnp.mean(pixels, axis=1))[:, None]
        variance = self._group_mean(jnp.mean(jnp.square(centred), axis=1))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        factor = materialise_cotangent(jnp.broadcast_to(factor[:, None], centred.shape))
        return (centred * factor + bias).reshape(x.shape).astype(dtype)

    def _group_mean(self, channel_means):
        """(B, C) means of the channels -> (B, C), each channel holding the mean of its group."""
        grouped = channel_means.reshape(channel_means.shape[0], self.num_groups, -1)
        means = jnp.mean(grouped, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, grouped.shape).reshape(channel_means.shape)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, two-pass variance, as torch.nn.LayerNorm."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x, scale, bias = promote_dtype(x, scale, bias)
        dtype, x = x.dtype, _at_least_float32(x)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        factor = materialise_cotangent(jnp.broadcast_to(jax.lax.rsqrt(variance + self.epsilon), x.shape))
        return (centred * factor * scale + bias).astype(dtype)


def _at_least_float32(x):
    """Half-precision numbers as float32: statistics and exponentials of half-precision runs are taken in it."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def attention(query, key, value, num_heads: int, mask=None, group: int = 1):
    """Plain softmax attention: query (B, Q, D), key and value (B, L, D) -> (B, Q, D), D split over `num_heads`.

    Args:
      query: (B, Q, D).
      key, value: (B, L, D), or (1, L, D) for those of all queries.
      num_heads: a divisor of D.
      mask: (Q, L), added to the logits; not with (1, L, D).
      group: examples that count as one against the limit of logits held at once, for callers that bound their batch
        themselves (core/groups.py).
    """
    if key.shape[0] == 1 < query.shape[0] and mask is None:
        # One after the other they are the queries of one example: there is nothing to transpose.
        folded = query.reshape(1, -1, query.shape[-1])
        return attention(folded, key, value, num_heads, group=group).reshape(query.shape)
    *batch, length, width = query.shape
    head_dim = width // num_heads

    # Contiguous matrices for each example and head are several times as fast on a CPU. Keys and values are held as
    # their transposes: the products of the backward pass are then as wide as the text or the picture, not as a head.
    def split(x):
        """(B, L, D) -> (B * heads, L, head_dim)."""
        heads = x.reshape(*x.shape[:-1], num_heads, head_dim)
        return jnp.swapaxes(heads, -3, -2).reshape(-1, x.shape[-2], head_dim)

    def split_transposed(x):
        """(B, L, D) -> (B * heads, head_dim, L)."""
        heads = x.reshape(*x.shape[:-1], num_heads, head_dim)
        return jnp.moveaxis(heads, -3, -1).reshape(-1, head_dim, x.shape[-2])

    query, key, value = split(query), split_transposed(key), split_transposed(value)
    num_blocks = -(-length * len(query) * key.shape[-1] // (group * _LOGITS_AT_ONCE))
    # Only pictures have so many tokens, and they have no mask.
    if num_blocks == 1 or mask is not None:
        mixed = _attend(query, key, value, mask)
    else:
        mixed = _in_blocks(query, key, value, num_blocks)
    mixed = mixed.reshape(*batch, num_heads, length, head_dim)
    return jnp.swapaxes(mixed, -3, -2).reshape(*batch, length, width)


def _in_blocks(query, key, value, num_blocks: int):
    """`_attend` block by block of queries, and in a backward pass again: the logits of all are never held."""
    count, length, head_dim = query.shape
    size = -(-length // num_blocks)
    blocks = jnp.pad(query, ((0, 0), (0, num_blocks * size - length), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(count, num_blocks, size, head_dim), 1, 0)
    mixed = jax.lax.map(jax.checkpoint(lambda block: _attend(block, key, value)), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(count, num_blocks * size, head_dim)[:, :length]


def _attend(query, key, value, mask=None):
    """Heads apart: query (N, Q, d), key and value (N, d, L), mask (Q, L) -> (N, Q, d)."""
    wide = jnp.promote_types(jnp.result_type(query, key), jnp.float32)
    logits = jnp.einsum("nqd,ndl->nql", query * query.shape[-1] ** -0.5, key, preferred_element_type=wide)
    if mask is not None:
        logits = logits + mask
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided last: on d numbers a query instead of L.
    mixed = jnp.einsum("nql,ndl->nqd", weights.astype(value.dtype), value, preferred_element_type=wide) / total
    return mixed.astype(value.dtype)


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D with the default time-embedding addition.

    (B, H, W, C) and the embedding (B, T) or None -> (B, H, W, features).
    """

    features: int
    num_groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x, time_embedding=None):
        hidden = nn.silu(GroupNorm(self.num_groups, self.epsilon, name="norm1")(x))
        hidden = Conv(self.features, name="conv1")(hidden)
        if time_embedding is not None:
            shift = nn.Dense(self.features, name="time_emb_proj")(nn.silu(time_embedding))
            hidden = hidden + shift[:, None, None, :]
        hidden = nn.silu(GroupNorm(self.num_groups, self.epsilon, name="norm2")(hidden))
        hidden = Conv(self.features, name="conv2")(hidden)
        if x.shape[-1] != self.features:
            x = pointwise_conv(self.features, "conv_shortcut")(x)
        return x + hidden


class Downsample(nn.Module):
    """Halves height and width by a strided convolution; the UNet pads 1 on each side, the VAE only below and right."""

    features: int
    padding: tuple[tuple[int, int], tuple[int, int]]

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, stride=2, padding=self.padding, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbour, cut to `size` (H, W) if given, then convolves.

    `size` is what a strided down-sampling came from: twice the input's size, or 1 less. For these the cut is what
    torch's nearest interpolation gives (`jax.image.resize` samples at pixel centres and differs).
    """

    features: int

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        return Conv(self.features, name="conv")(x, size or (2 * x.shape[1], 2 * x.shape[2]))


def _double(x):
    """(B, H, W, C) -> (B, 2 H, 2 W, C), each pixel four times."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
