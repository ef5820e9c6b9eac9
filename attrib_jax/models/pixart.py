"""diffusers' PixArtTransformer2DModel: the denoiser of PixArt-alpha and PixArt-Sigma, in Flax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attrib_jax.models.dit_layers import (
    FeedForward,
    PatchEmbed,
    Projection,
    check_conditioning,
    check_counts,
    check_latents,
    embed_number,
    from_patches,
    gelu,
    modulate,
    normalise,
    options_of,
    read_options,
)
from attrib_jax.ops import attention
from attrib_jax.ops.attention import LOGITS_AT_ONCE

CLASS_NAME = "PixArtTransformer2DModel"
_FAMILY = "PixArt"
_MASKED = -10000.0  # added to the logits of padding
_FIXED_OPTIONS = {
    "_class_name": CLASS_NAME,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "upcast_attention": False,
}


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """The architecture of a `PixArtTransformer2DModel`: the keys, meanings and defaults of diffusers' config.json.

    Attributes:
      num_attention_heads, attention_head_dim: number and width of the heads; their product is the width of the tokens.
      in_channels: channels of the latents.
      out_channels: those of the prediction; twice `in_channels` for a model that also predicts variances.
      num_layers: transformer blocks.
      cross_attention_dim: width that the text states are projected to, that of the tokens.
      sample_size: side of the latents that the position embedding is scaled for; the forward takes any size.
      patch_size: side of the patches of latents that become a token.
      interpolation_scale: see `position_table`; None for `sample_size` // 64, or 1 if that is 0.
      use_additional_conditions: whether image size and aspect ratio are inputs (PixArt-alpha of 1024 pixels); None for
        a `sample_size` of 128 alone.
      caption_channels: width of the text states.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    sample_size: int = 128
    patch_size: int = 2
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int = 4096

    def __post_init__(self):
        names = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
        check_counts(_FAMILY, self, *names, "caption_channels")
        if self.cross_attention_dim != self.width or self.width % 12:
            raise ValueError(
                f"{_FAMILY} config: cross_attention_dim={self.cross_attention_dim}, expected num_attention_heads x "
                f"attention_head_dim = {self.width}, a multiple of 12"
            )
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"{_FAMILY} config: out_channels={self.out_channels}, expected "
                f"in_channels={self.in_channels} or twice it"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PixArtConfig":
        """Reads the parsed config.json of a diffusers folder; raises ValueError for what is not supported."""
        return read_options(cls, config, _FIXED_OPTIONS, _FAMILY)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config.json contents from which diffusers builds the same model."""
        return {**options_of(self, CLASS_NAME), **_FIXED_OPTIONS}

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels

    @property
    def takes_sizes(self) -> bool:
        """Whether image size and aspect ratio are inputs."""
        return self.sample_size == 128 if self.use_additional_conditions is None else self.use_additional_conditions

    @property
    def conditioning(self) -> dict[str, tuple[int | None, ...]]:
        """Name -> shape of one example's conditioning; None stands for the number of text states."""
        shapes: dict[str, tuple[int | None, ...]] = {"text": (None, self.caption_channels), "mask": (None,)}
        return shapes | ({"resolution": (2,), "aspect_ratio": (1,)} if self.takes_sizes else {})


class _Attention(nn.Module):
    """Attention of (B, N, D) to a text (B or 1, L, D) with mask (B or 1, L), or to itself if that is None."""

    num_heads: int

    @nn.compact
    def __call__(self, x, text=None, mask=None):
        width = x.shape[-1]
        states = x if text is None else text
        query = nn.Dense(width, name="to_q")(x)
        # A bfloat16 run projects float32 text by float32 kernels (`cast_params`) and rounds after the product.
        key, value = (nn.Dense(width, name=name)(states).astype(query.dtype) for name in ("to_k", "to_v"))
        # The callers bound the batch.
        at_once = LOGITS_AT_ONCE * len(x)
        mixed = attention(query, key, value, self.num_heads, key_mask=mask, logits_at_once=at_once)
        return nn.Dense(width, name="to_out_0")(mixed)


class _Block(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x, text, mask, modulation):
        """(B, N, D) with the modulation (B, 6, D) of all blocks, to which each adds a table of its own."""
        table = self.param("scale_shift_table", nn.initializers.normal(x.shape[-1] ** -0.5), (6, x.shape[-1]))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.moveaxis(table + modulation, 1, 0)
        attended = _Attention(self.num_heads, name="attn1")(modulate(normalise(x), scale, shift))
        x = x + gate[:, None] * attended
        x = x + _Attention(self.num_heads, name="attn2")(x, text, mask)
        return x + gate_mlp[:, None] * FeedForward(name="ff")(modulate(normalise(x), scale_mlp, shift_mlp))


class _TimeSizeEmbedding(nn.Module):
    """The embedding (B, features) of the timestep, and of the image's size and aspect ratio where they are inputs."""

    features: int

    @nn.compact
    def __call__(self, timesteps, sizes, dtype):
        embedding = embed_number(timesteps, self.features, "timestep_embedder", dtype)
        if not sizes:
            return embedding
        parts = []
        for numbers, name in zip(sizes, ("resolution_embedder", "aspect_ratio_embedder"), strict=True):
            embedded = embed_number(numbers.reshape(-1), self.features // 3, name, dtype)
            parts.append(embedded.reshape(len(numbers), -1))
        return embedding + jnp.concatenate(parts, axis=1)


class _Modulations(nn.Module):
    """(the modulation of all blocks (B, 6, D), the embedding (B, D))."""

    features: int

    @nn.compact
    def __call__(self, timesteps, sizes, dtype):
        embedding = _TimeSizeEmbedding(self.features, name="emb")(timesteps, sizes, dtype)
        modulation = nn.Dense(6 * self.features, name="linear")(nn.silu(embedding))
        return modulation.reshape(len(modulation), 6, self.features), embedding


class PixArtTransformer2DModel(nn.Module):
    """The denoiser: `module.apply({"params": params}, latents, timesteps, conditioning)`; dropout is no part of it."""

    config: PixArtConfig

    @nn.compact
    def __call__(self, latents, timesteps, conditioning):
        """Predicts the noise; predicted variances are left out.

        Args:
          latents: (B, h, w, in_channels) noisy latents, float32; float64 latents or parameters give a float64 forward.
          timesteps: (B,) or ().
          conditioning: {"text": (B, L, caption_channels), "mask": (B, L), 1 for a token and 0 for padding}, each with B
            or 1; with `use_additional_conditions` also "resolution": (B, 2) height and width in pixels, and
            "aspect_ratio": (B, 1), their ratio.

        Returns:
          (B, h, w, in_channels).
        """
        config = self.config
        batch, height, width, channels = latents.shape
        check_latents(_FAMILY, latents, config.in_channels, config.patch_size)
        check_conditioning(conditioning, config.conditioning, batch)
        interpolation = config.interpolation_scale or max(config.sample_size // 64, 1)
        base = config.sample_size // config.patch_size
        x = PatchEmbed(config.width, config.patch_size, base, interpolation, name="pos_embed")(latents)
        sizes = [conditioning[name] for name in ("resolution", "aspect_ratio") if name in conditioning]
        timesteps = jnp.broadcast_to(timesteps, (batch,))
        modulation, embedding = _Modulations(config.width, name="adaln_single")(timesteps, sizes, x.dtype)
        text = Projection(config.width, gelu, name="caption_projection")(conditioning["text"])
        mask = (1 - conditioning["mask"].astype(x.dtype)) * _MASKED
        for index in range(config.num_layers):
            block = _Block(config.num_attention_heads, name=f"transformer_blocks_{index}")
            x = block(x, text, mask, modulation)
        table = self.param("scale_shift_table", nn.initializers.normal(config.width**-0.5), (2, config.width))
        shift, scale = jnp.moveaxis(table + embedding[:, None], 1, 0)
        predicted = config.out_channels or channels
        patches = nn.Dense(config.patch_size**2 * predicted, name="proj_out")(modulate(normalise(x), scale, shift))
        return from_patches(patches, height, width, config.patch_size)[..., :channels]
