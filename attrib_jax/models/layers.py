"""Layers that the UNet and the autoencoder share, named as their diffusers counterparts.

Arrays are channels last. Every layer computes in the promoted dtype of its input and its parameters, so float64
parameters (with `jax_enable_x64`) give a float64 forward, and bfloat16 latents and parameters a bfloat16 one, in which
norms and softmax are float32 still. Parameter names follow diffusers' module names, so that the
converter is a renaming and a transposition.
"""

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from attrib_jax.ops import conv2d, group_norm, layer_norm, upsample_conv2d


class Conv(nn.Module):
    """2-D convolution of (B, H, W, C) with an HWIO kernel, `padding` zeros as ((top, bottom), (left, right))."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x):
        kernel, bias = _kernel_and_bias(self, self.kernel_size, x.shape[-1])
        return conv2d(x, kernel, self.stride, self.padding) + bias


class UpsampleConv(nn.Module):
    """3x3 convolution of (B, H, W, C) doubled by nearest neighbour and cut to `size` (H', W'), if given."""

    features: int

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        kernel, bias = _kernel_and_bias(self, 3, x.shape[-1])
        return upsample_conv2d(x, kernel, size) + bias


def _kernel_and_bias(module: nn.Module, size: int, channels: int):
    kernel = module.param("kernel", nn.initializers.lecun_normal(), (size, size, channels, module.features))
    return kernel, module.param("bias", nn.initializers.zeros_init(), (module.features,))


def pointwise_conv(features: int, name: str | None) -> Conv:
    """A 1x1 convolution: a linear map of each pixel's channels, stored as diffusers stores it."""
    return Conv(features, kernel_size=1, padding=((0, 0), (0, 0)), name=name)


class GroupNorm(nn.Module):
    """Group normalisation of (B, ..., C), as torch.nn.GroupNorm."""

    num_groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        return group_norm(*promote_dtype(x, *_scale_and_bias(self, x)), self.num_groups, self.epsilon)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, as torch.nn.LayerNorm."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        return layer_norm(*promote_dtype(x, *_scale_and_bias(self, x)), self.epsilon)


def _scale_and_bias(module: nn.Module, x):
    shape = (x.shape[-1],)
    scale = module.param("scale", nn.initializers.ones_init(), shape)
    return scale, module.param("bias", nn.initializers.zeros_init(), shape)


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

    `size` is what a strided down-sampling came from: twice the input's size, or 1 less.
    """

    features: int

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        return UpsampleConv(self.features, name="conv")(x, size)
