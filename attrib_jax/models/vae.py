"""Autoencoders as Flax modules: diffusers' AutoencoderKL of Stable Diffusion, and one of pixels without weights."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from attrib_jax.core.checks import check_positive
from attrib_jax.models.layers import Conv, Downsample, GroupNorm, ResnetBlock, Upsample, pointwise_conv
from attrib_jax.ops import attention

_EPSILON = 1e-6  # of every normalisation in the autoencoder
_DOWNSAMPLE_PADDING = ((0, 1), (0, 1))
_PIXEL_LOGVAR = -30.0  # where `LatentDistribution` is clipped: latents have no spread
PIXEL_CLASS_NAME = "PixelAutoencoder"


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The options of a diffusers AutoencoderKL config.json that change the mathematics, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "AutoencoderKLConfig":
        """Reads a config.json; raises ValueError for an option that this port does not have."""
        class_name = config.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            raise ValueError(f"autoencoder class {class_name!r} is not supported, expected 'AutoencoderKL'")
        for key, supported in {"act_fn": "silu", "latents_mean": None, "latents_std": None}.items():
            if config.get(key, supported) != supported:
                raise ValueError(f"autoencoder config has {key}={config[key]!r}; supported: {supported!r}")
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            unknown = sorted(set(config.get(key) or ()) - {block})
            if unknown:
                raise ValueError(f"autoencoder config has {key} with {unknown}; supported: {block!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if key in known}
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that diffusers' AutoencoderKL reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **{key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()},
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scaled(self, latents: Any) -> Any:
        """The autoencoder's own latents as the denoiser takes them: (latents - shift_factor) scaling_factor."""
        return (latents if self.shift_factor is None else latents - self.shift_factor) * self.scaling_factor

    def unscaled(self, latents: Any) -> Any:
        """The inverse of `scaled`."""
        own = latents / self.scaling_factor
        return own if self.shift_factor is None else own + self.shift_factor


class LatentDistribution(NamedTuple):
    """Mean and log-variance (clipped to [-30, 20] as in diffusers) of the latents, each (B, h, w, latent_channels)."""

    mean: jnp.ndarray
    logvar: jnp.ndarray


class VaeAttention(nn.Module):
    """Single-head self-attention over the pixels of (B, H, W, C), with a residual connection."""

    num_groups: int

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        hidden = GroupNorm(self.num_groups, _EPSILON, name="group_norm")(x).reshape(batch, height * width, channels)
        query, key, value = (nn.Dense(channels, name=name)(hidden) for name in ("to_q", "to_k", "to_v"))
        hidden = nn.Dense(channels, name="to_out_0")(attention(query, key, value, num_heads=1))
        return x + hidden.reshape(x.shape)


class VaeMidBlock(nn.Module):
    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        groups = self.config.norm_num_groups
        x = ResnetBlock(x.shape[-1], groups, _EPSILON, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = VaeAttention(groups, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], groups, _EPSILON, name="resnets_1")(x)


class EncoderBlock(nn.Module):
    config: AutoencoderKLConfig
    features: int
    downsample: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block):
            x = ResnetBlock(self.features, self.config.norm_num_groups, _EPSILON, name=f"resnets_{i}")(x)
        if self.downsample:
            x = Downsample(self.features, _DOWNSAMPLE_PADDING, name="downsamplers_0")(x)
        return x


class DecoderBlock(nn.Module):
    config: AutoencoderKLConfig
    features: int
    upsample: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block + 1):
            x = ResnetBlock(self.features, self.config.norm_num_groups, _EPSILON, name=f"resnets_{i}")(x)
        if self.upsample:
            x = Upsample(self.features, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        channels = config.block_out_channels
        x = Conv(channels[0], name="conv_in")(x)
        for i, features in enumerate(channels):
            x = EncoderBlock(config, features, downsample=i < len(channels) - 1, name=f"down_blocks_{i}")(x)
        x = VaeMidBlock(config, name="mid_block")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, _EPSILON, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        channels = config.block_out_channels[::-1]
        x = Conv(channels[0], name="conv_in")(x)
        x = VaeMidBlock(config, name="mid_block")(x)
        for i, features in enumerate(channels):
            x = DecoderBlock(config, features, upsample=i < len(channels) - 1, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, _EPSILON, name="conv_norm_out")(x))
        return Conv(config.out_channels, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images (B, H, W, 3) in [-1, 1] <-> latents (B, H/f, W/f, c), f = `config.downscale`.

    Latents here are the autoencoder's own: `config.scaled` gives those that a denoiser takes, and `config.unscaled`
    those for `decode`.
    """

    config: AutoencoderKLConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = pointwise_conv(2 * config.latent_channels, None)
        if config.use_post_quant_conv:
            self.post_quant_conv = pointwise_conv(config.latent_channels, None)

    def encode(self, images) -> LatentDistribution:
        """Images (B, H, W, 3) in [-1, 1] -> the distribution of their unscaled latents."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return LatentDistribution(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents):
        """Unscaled latents (B, h, w, c) -> images (B, H, W, 3), nominally in [-1, 1], not clipped."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images):
        """Images -> their reconstruction from the mean latents; touches every parameter, so `init` makes all."""
        return self.decode(self.encode(images).mean)


@dataclasses.dataclass(frozen=True)
class PixelAutoencoderConfig:
    """How pixels become latents.

    Attributes:
      sample_size: side in pixels of the images that the model was trained on.
      patch: side of the squares of pixels that become the channels of one latent pixel.
      grey: whether latents hold one value for each pixel, the mean of its colours, instead of three.
      scaling_factor: what latents are multiplied by before they meet the UNet.
    """

    sample_size: int = 8
    patch: int = 2
    grey: bool = True
    scaling_factor: float = 1.0

    def __post_init__(self):
        for name in ("sample_size", "patch"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("scaling_factor", self.scaling_factor)
        if self.sample_size % self.patch:
            raise ValueError(f"sample_size is {self.sample_size}; expected a multiple of patch, {self.patch}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "PixelAutoencoderConfig":
        """Reads a config.json; raises ValueError for an option that is not known."""
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the config of {PIXEL_CLASS_NAME} has {unknown[0]!r}, which is not known")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config.json of a pipeline's vae/ folder."""
        return {"_class_name": PIXEL_CLASS_NAME, **vars(self)}

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return 3

    @property
    def latent_channels(self) -> int:
        return self.patch**2 * (1 if self.grey else 3)

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel along one side."""
        return self.patch

    def scaled(self, latents: Any) -> Any:
        """The autoencoder's own latents as the denoiser takes them."""
        return latents * self.scaling_factor

    def unscaled(self, latents: Any) -> Any:
        """The inverse of `scaled`."""
        return latents / self.scaling_factor


class PixelAutoencoder(nn.Module):
    """An autoencoder without weights: images (B, H, W, 3) in [-1, 1] <-> latents (B, H/p, W/p, c), for pixel models.

    Lossless for grey images, or in colour. It stands where a Stable Diffusion pipeline has its AutoencoderKL and has
    the same methods, so that everything above it (encoding, queries, attribution) runs unchanged. PyTorch diffusers has
    no such class, so that of a pipeline folder with it diffusers opens the UNet, text encoder and scheduler only.
    """

    config: PixelAutoencoderConfig

    def encode(self, images) -> LatentDistribution:
        """Images (B, H, W, 3) in [-1, 1] -> their unscaled latents, as a distribution without spread."""
        patch = self.config.patch
        pixels = jnp.mean(images, axis=-1, keepdims=True) if self.config.grey else images
        batch, height, width, channels = pixels.shape
        tiles = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
        mean = jnp.moveaxis(tiles, 2, 3).reshape(batch, height // patch, width // patch, -1)
        return LatentDistribution(mean, jnp.full_like(mean, _PIXEL_LOGVAR))

    def decode(self, latents):
        """Unscaled latents (B, h, w, c) -> images (B, H, W, 3), nominally in [-1, 1], not clipped."""
        patch = self.config.patch
        batch, height, width, _ = latents.shape
        tiles = jnp.moveaxis(latents.reshape(batch, height, width, patch, patch, -1), 2, 3)
        pixels = tiles.reshape(batch, height * patch, width * patch, -1)
        return jnp.broadcast_to(pixels, (*pixels.shape[:-1], 3))

    def __call__(self, images):
        """Images -> their reconstruction."""
        return self.decode(self.encode(images).mean)
