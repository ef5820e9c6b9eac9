"""diffusers' SD3Transformer2DModel: the denoiser of Stable Diffusion 3 and 3.5, in Flax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attrib_jax.models.dit_layers import (
    JointBlock,
    NormOut,
    PatchEmbed,
    TimeTextEmbedding,
    check_conditioning,
    check_counts,
    check_latents,
    from_patches,
    options_of,
    read_options,
)

CLASS_NAME = "SD3Transformer2DModel"
_FAMILY = "Stable Diffusion 3"


@dataclasses.dataclass(frozen=True)
class SD3Config:
    """The architecture of an `SD3Transformer2DModel`: the keys, meanings and defaults of diffusers' config.json.

    Attributes:
      sample_size: side of the latents that the position embedding is centred on; the forward takes any that fit.
      patch_size: side of the patches of latents that become a token.
      in_channels, out_channels: channels of the latents and of the prediction.
      num_layers: transformer blocks.
      attention_head_dim, num_attention_heads: width and number of the heads; their product is the width of the tokens.
      joint_attention_dim: width of the text states.
      caption_projection_dim: width that the text states are projected to, that of the tokens.
      pooled_projection_dim: width of the pooled text.
      pos_embed_max_size: patches along a side of the stored position embedding.
      dual_attention_layers: blocks in which the image also attends to itself alone (SD 3.5 medium).
      qk_norm: None or "rms_norm" (SD 3.5): whether queries and keys are normalised.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        names = ("sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads")
        check_counts(_FAMILY, self, *names, "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(f"{_FAMILY} config: out_channels={self.out_channels}, expected {self.in_channels}")
        if self.caption_projection_dim != self.width or self.width % 4:
            raise ValueError(
                f"{_FAMILY} config: caption_projection_dim={self.caption_projection_dim}, expected "
                f"num_attention_heads x attention_head_dim = {self.width}, a multiple of 4"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"{_FAMILY} config: qk_norm={self.qk_norm!r} is not supported, only None and 'rms_norm'")
        beyond = [index for index in self.dual_attention_layers if not 0 <= index < self.num_layers]
        if beyond:
            raise ValueError(f"{_FAMILY} config: dual_attention_layers has {beyond}; num_layers is {self.num_layers}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SD3Config":
        """Reads the parsed config.json of a diffusers folder; raises ValueError for what is not supported."""
        return read_options(cls, config, {"_class_name": CLASS_NAME}, _FAMILY)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config.json contents from which diffusers builds the same model."""
        return options_of(self, CLASS_NAME)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels

    @property
    def conditioning(self) -> dict[str, tuple[int | None, ...]]:
        """Name -> shape of one example's conditioning; None stands for the number of text states."""
        return {"text": (None, self.joint_attention_dim), "pooled": (self.pooled_projection_dim,)}


class SD3Transformer2DModel(nn.Module):
    """The denoiser: `module.apply({"params": params}, latents, timesteps, conditioning)`; dropout is no part of it."""

    config: SD3Config

    @nn.compact
    def __call__(self, latents, timesteps, conditioning):
        """Predicts the velocity, noise - clean latents.

        Args:
          latents: (B, h, w, in_channels) noisy latents, float32; float64 latents or parameters give a float64 forward.
          timesteps: (B,) or (), 1000 sigma.
          conditioning: {"text": (B, L, joint_attention_dim), "pooled": (B, pooled_projection_dim)}, each with B or 1.

        Returns:
          (B, h, w, in_channels).
        """
        config = self.config
        batch, height, width, _ = latents.shape
        check_latents(_FAMILY, latents, config.in_channels, config.patch_size)
        check_conditioning(conditioning, config.conditioning, batch)
        base = config.sample_size // config.patch_size
        embed = PatchEmbed(config.width, config.patch_size, base, stored=config.pos_embed_max_size, name="pos_embed")
        image = embed(latents)
        timesteps = jnp.broadcast_to(timesteps, (batch,))
        embed_time = TimeTextEmbedding(config.width, name="time_text_embed")
        embedding = embed_time(timesteps, conditioning["pooled"], None, image.dtype)
        text = nn.Dense(config.width, name="context_embedder")(conditioning["text"]).astype(image.dtype)
        for index in range(config.num_layers):
            block = JointBlock(
                config.num_attention_heads,
                qk_norm=config.qk_norm is not None,
                text_output=index < config.num_layers - 1,
                dual_attention=index in config.dual_attention_layers,
                name=f"transformer_blocks_{index}",
            )
            image, text = block(image, text, embedding)
        image = NormOut(name="norm_out")(image, embedding)
        patches = nn.Dense(config.patch_size**2 * config.in_channels, name="proj_out")(image)
        return from_patches(patches, height, width, config.patch_size)
