"""diffusers' FluxTransformer2DModel: the denoiser of FLUX.1, in Flax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from attrib_jax.models.dit_layers import (
    JointAttention,
    JointBlock,
    Modulation,
    NormOut,
    TimeTextEmbedding,
    check_conditioning,
    check_counts,
    check_latents,
    gelu,
    modulate,
    normalise,
    options_of,
    read_options,
)

CLASS_NAME = "FluxTransformer2DModel"
_FAMILY = "FLUX"
_PATCH = 2  # latents are packed in squares of this side before they meet the model
_ROTARY_BASE = 10000


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """The architecture of a `FluxTransformer2DModel`: the keys, meanings and defaults of diffusers' config.json.

    Attributes:
      in_channels, out_channels: channels of a packed token: four times those of the latents.
      num_layers: blocks in which text and image have weights of their own.
      num_single_layers: blocks in which they share them.
      attention_head_dim, num_attention_heads: width and number of the heads; their product is the width of the tokens.
      joint_attention_dim: width of the text states.
      pooled_projection_dim: width of the pooled text.
      guidance_embeds: whether the guidance scale is an input (FLUX.1 dev).
      axes_dims_rope: channels of a head that are rotated by index, row and column; their sum is attention_head_dim.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
        check_counts(_FAMILY, self, *names, "joint_attention_dim", "pooled_projection_dim")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(f"{_FAMILY} config: out_channels={self.out_channels}, expected {self.in_channels}")
        if self.in_channels % _PATCH**2:
            raise ValueError(f"{_FAMILY} config: in_channels={self.in_channels}, expected a multiple of {_PATCH**2}")
        rotated = self.axes_dims_rope
        if len(rotated) != 3 or any(size % 2 for size in rotated) or sum(rotated) != self.attention_head_dim:
            raise ValueError(
                f"{_FAMILY} config: axes_dims_rope={list(rotated)}, expected three even numbers with the sum "
                f"attention_head_dim={self.attention_head_dim}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """Reads the parsed config.json of a diffusers folder; raises ValueError for what is not supported."""
        return read_options(cls, config, {"_class_name": CLASS_NAME, "patch_size": 1}, _FAMILY)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config.json contents from which diffusers builds the same model."""
        return {**options_of(self, CLASS_NAME), "patch_size": 1}

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels // _PATCH**2

    @property
    def conditioning(self) -> dict[str, tuple[int | None, ...]]:
        """Name -> shape of one example's conditioning; None stands for the number of text states."""
        shapes = {"text": (None, self.joint_attention_dim), "pooled": (self.pooled_projection_dim,)}
        return shapes | ({"guidance": ()} if self.guidance_embeds else {})


class SingleBlock(nn.Module):
    """A block in which text and image share weights, and attention runs beside the network: (B, L + N, D)."""

    num_heads: int

    @nn.compact
    def __call__(self, x, embedding, rotation):
        shift, scale, gate = Modulation(3, name="norm")(embedding)
        normed = modulate(normalise(x), scale, shift)
        hidden = gelu(nn.Dense(4 * x.shape[-1], name="proj_mlp")(normed))
        attend = JointAttention(self.num_heads, qk_norm=True, image_output=False, name="attn")
        joined = jnp.concatenate([attend(normed, rotation=rotation)[0], hidden], axis=-1)
        return x + gate[:, None] * nn.Dense(x.shape[-1], name="proj_out")(joined)


class FluxTransformer2DModel(nn.Module):
    """The denoiser: `module.apply({"params": params}, latents, timesteps, conditioning)`; dropout is no part of it."""

    config: FluxConfig

    @nn.compact
    def __call__(self, latents, timesteps, conditioning):
        """Predicts the velocity, noise - clean latents.

        Args:
          latents: (B, h, w, c) noisy latents of even sides, not packed, float32; float64 latents or parameters give a
            float64 forward.
          timesteps: (B,) or (), 1000 sigma. diffusers' module takes sigma.
          conditioning: {"text": (B, L, joint_attention_dim), "pooled": (B, pooled_projection_dim)}, each with B or 1;
            with `guidance_embeds` also "guidance": (B,) guidance scales.

        Returns:
          (B, h, w, c).
        """
        config = self.config
        batch, height, width, _ = latents.shape
        check_latents(_FAMILY, latents, config.latent_channels, _PATCH)
        check_conditioning(conditioning, config.conditioning, batch)
        rows, columns = height // _PATCH, width // _PATCH
        # Packed tokens have the channels of the latents outermost, unlike the patches of SD 3.
        packed = latents.reshape(batch, rows, _PATCH, columns, _PATCH, -1).transpose(0, 1, 3, 5, 2, 4)
        image = nn.Dense(config.width, name="x_embedder")(packed.reshape(batch, rows * columns, -1))
        timesteps = jnp.broadcast_to(timesteps, (batch,))
        embed_time = TimeTextEmbedding(config.width, name="time_text_embed")
        embedding = embed_time(timesteps, conditioning["pooled"], conditioning.get("guidance"), image.dtype)
        text = nn.Dense(config.width, name="context_embedder")(conditioning["text"]).astype(image.dtype)
        length = text.shape[1]
        rotation = _rotation(config, length, rows, columns)
        for index in range(config.num_layers):
            block = JointBlock(config.num_attention_heads, qk_norm=True, name=f"transformer_blocks_{index}")
            image, text = block(image, text, embedding, rotation)
        tokens = jnp.concatenate([text, image], axis=1)
        for index in range(config.num_single_layers):
            block = SingleBlock(config.num_attention_heads, name=f"single_transformer_blocks_{index}")
            tokens = block(tokens, embedding, rotation)
        image = NormOut(name="norm_out")(tokens[:, length:], embedding)
        packed = nn.Dense(config.in_channels, name="proj_out")(image)
        packed = packed.reshape(batch, rows, columns, -1, _PATCH, _PATCH).transpose(0, 1, 4, 2, 5, 3)
        return packed.reshape(latents.shape)


def _rotation(config: FluxConfig, length: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding, each (length + rows * columns, attention_head_dim) float32.

    A position is (0, row, column) of an image token and (0, 0, 0) of every text token; angles are float64.
    """
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    image = np.stack([np.zeros_like(row), row, column], axis=-1).reshape(-1, 3)
    positions = np.concatenate([np.zeros((length, 3)), image])
    angles = []
    for axis, size in enumerate(config.axes_dims_rope):
        frequencies = 1.0 / _ROTARY_BASE ** (np.arange(0, size, 2) / size)
        angles.append(np.repeat(np.outer(positions[:, axis], frequencies), 2, axis=1))
    joined = np.concatenate(angles, axis=1)
    return np.cos(joined).astype(np.float32), np.sin(joined).astype(np.float32)
