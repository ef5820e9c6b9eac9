"""An autoencoder without weights: images themselves as latents, for models that work on pixels.

It stands where a Stable Diffusion pipeline has its AutoencoderKL and has the same methods, so that everything above it
(encoding, queries, attribution) runs unchanged. It is ours: PyTorch diffusers has no such class, so that of a pipeline
folder with it diffusers opens the UNet, text encoder and scheduler only.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attrib_jax.core.checks import check_positive
from attrib_jax.models.vae import LatentDistribution

CLASS_NAME = "PixelAutoencoder"
_LOGVAR = -30.0  # where `LatentDistribution` is clipped: latents have no spread


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
            raise ValueError(f"the config of {CLASS_NAME} has {unknown[0]!r}, which is not known")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config.json of a pipeline's vae/ folder."""
        return {"_class_name": CLASS_NAME, **vars(self)}

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


class PixelAutoencoder(nn.Module):
    """Images (B, H, W, 3) in [-1, 1] <-> latents (B, H/p, W/p, c): lossless for grey images, or in colour."""

    config: PixelAutoencoderConfig

    def encode(self, images) -> LatentDistribution:
        """Images (B, H, W, 3) in [-1, 1] -> their unscaled latents, as a distribution without spread."""
        patch = self.config.patch
        pixels = jnp.mean(images, axis=-1, keepdims=True) if self.config.grey else images
        batch, height, width, channels = pixels.shape
        tiles = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
        mean = jnp.moveaxis(tiles, 2, 3).reshape(batch, height // patch, width // patch, -1)
        return LatentDistribution(mean, jnp.full_like(mean, _LOGVAR))

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
