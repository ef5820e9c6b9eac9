"""diffusers' UNet2DConditionModel: the denoiser of the Stable Diffusion family, in Flax.

The forward pass follows `diffusers.UNet2DConditionModel`, and so do the parameter names: a '.' before an index becomes
'_', so `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight` is the transpose of
`params["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["kernel"]`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Upsample,
    pointwise_conv,
)
from attrib_jax.models.projected_text import ProjectedText
from attrib_jax.ops import attention
from attrib_jax.ops.attention import LOGITS_AT_ONCE

# Whether a block of this class attends to the text.
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# How the names of the kernels end that are applied to the text alone.
TEXT_KERNELS = ("attn2/to_k/kernel", "attn2/to_v/kernel")

# Options of diffusers that change the forward pass or its parameters, each with the one value that is implemented. It
# is also diffusers' default, so an absent key is fine. Keys in neither this table nor UNetConfig do not change what
# the supported blocks compute.
_FIXED_OPTIONS = {
    "_class_name": "UNet2DConditionModel",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "reverse_transformer_layers_per_block": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "attention_type": "default",
}

# Of SDXL: height and width of the original image, top and left of the crop, height and width of the target.
SIZE_IDS = 6
_ADDITIONS = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")

# The spatial transformer's GroupNorm has its own epsilon in diffusers, whatever `norm_eps` says.
_TRANSFORMER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet2DConditionModel`: the keys, meanings and defaults of diffusers' config.json.

    Attributes:
      sample_size: height and width of the latents that the model was trained on; the forward takes any size.
      in_channels, out_channels: channels of the latents and of the prediction.
      center_input_sample: whether the input x is replaced by 2 x - 1.
      flip_sin_to_cos, freq_shift: layout of the timestep sinusoids, see `timestep_sinusoids`.
      down_block_types, up_block_types: block classes from the outermost level inwards, and from the innermost outwards.
      block_out_channels: channels of each level, outermost first.
      layers_per_block: residual blocks in a down block, for all levels or one number a level; up blocks have one more.
      norm_num_groups, norm_eps: settings of every GroupNorm, except that the epsilon inside a transformer is 1e-6.
      cross_attention_dim: width of the text states.
      transformer_layers_per_block: transformer blocks after each residual block, for all levels or one number a level.
      attention_head_dim: the NUMBER of attention heads, for all levels or one number a level. diffusers keeps this
        misnomer because published checkpoints depend on it.
      use_linear_projection: whether the transformers' input and output projections are stored as linear layers (SD 2)
        instead of 1x1 convolutions (SD 1); the same map either way.
      upcast_attention: asks half-precision runs to compute attention logits in float32. Kept for export; float32 and
        float64 are not affected by it.
      time_embedding_dim: width of the time embedding; None for four times the outermost channels.
      addition_embed_type: "text_time" for SDXL, whose time embedding is joined by pooled text and size ids; or None.
      addition_time_embed_dim: width of the sinusoids of each size id.
      projection_class_embeddings_input_dim: width of the pooled text and of all size ids' sinusoids together.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    time_embedding_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads the parsed config.json of a diffusers UNet folder; absent keys take diffusers' defaults.

        A `num_attention_heads` other than null takes precedence over `attention_head_dim`, which means the same.
        Raises ValueError, naming the key and its value, for anything that this implementation would compute wrongly.
        """
        for key, supported in _FIXED_OPTIONS.items():
            if config.get(key, supported) != supported:
                raise ValueError(
                    f"UNet config: {key}={config[key]!r} is not supported, only {supported!r}. Use a checkpoint of the "
                    "Stable Diffusion 1, 2 or XL family."
                )
        names = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if key in names}
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        heads = config.get("num_attention_heads")
        if heads is not None:
            values["attention_head_dim"] = tuple(heads) if isinstance(heads, list) else heads
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config.json contents from which diffusers builds the same model."""
        values = dataclasses.asdict(self)
        if self.addition_embed_type is None:
            # A model without them has the config, and so the fingerprint, that it had before they were known.
            values = {key: value for key, value in values.items() if key not in _ADDITIONS}
        fixed = {"_class_name": _FIXED_OPTIONS["_class_name"]}
        return fixed | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def per_level(self, name: str) -> tuple[int, ...]:
        """The field `name` as one number for each level, outermost first."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text that the model takes; None for one that takes none."""
        if self.addition_embed_type is None:
            return None
        assert self.projection_class_embeddings_input_dim and self.addition_time_embed_dim  # checked when it was made
        return self.projection_class_embeddings_input_dim - SIZE_IDS * self.addition_time_embed_dim

    def __post_init__(self):
        for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            unknown = [block for block in getattr(self, name) if block not in known]
            if unknown:
                raise ValueError(
                    f"UNet config: {name} has the unsupported {unknown[0]!r}; supported: {', '.join(known)}."
                )
        for name in ("in_channels", "out_channels", "norm_num_groups", "cross_attention_dim"):
            _check_counts(name, getattr(self, name))
        numbers = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")
        for name in numbers:
            _check_counts(name, *self.per_level(name))
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", *numbers):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"UNet config: {name} has {len(value)} entries {value}, expected {levels}, one for each entry of "
                    f"block_out_channels={self.block_out_channels}."
                )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"UNet config: addition_embed_type={self.addition_embed_type!r} is not supported, only None and "
                "'text_time'. Use a checkpoint of the Stable Diffusion 1, 2 or XL family."
            )
        if self.addition_embed_type is not None:
            for name in _ADDITIONS[1:]:
                _check_counts(name, getattr(self, name))
            if not self.pooled_width or self.pooled_width < 1:
                raise ValueError(
                    f"UNet config: projection_class_embeddings_input_dim={self.projection_class_embeddings_input_dim} "
                    f"leaves no room for pooled text beside {SIZE_IDS} size ids of "
                    f"addition_time_embed_dim={self.addition_time_embed_dim}."
                )
        for channels, heads in zip(self.block_out_channels, self.per_level("attention_head_dim")):
            if channels % self.norm_num_groups or channels % heads:
                raise ValueError(
                    f"UNet config: block_out_channels={self.block_out_channels} must be multiples of "
                    f"norm_num_groups={self.norm_num_groups} and of the number of heads "
                    f"attention_head_dim={self.attention_head_dim}."
                )


def _check_counts(name: str, *values: Any) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"UNet config: {name} must hold positive whole numbers, got {value!r}.")


def timestep_sinusoids(timesteps, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0, dtype=jnp.float32):
    """Sinusoidal features of timesteps, as diffusers' `get_timestep_embedding`: (B,) -> (B, width) in `dtype`.

    With n = width // 2, the features are sin and cos of t * 10000^(-i / (n - freq_shift)) for i = 0 .. n - 1: first the
    n sines, then the n cosines, or the reverse if `flip_sin_to_cos`. An odd `width` ends in a zero.
    """
    half = width // 2
    # On the host and in the order of operations of the reference: at t = 999 a last-bit difference in a frequency is
    # visible in the result.
    exponents = np.asarray(-math.log(10000), dtype) * np.arange(half, dtype=dtype)
    frequencies = np.exp(exponents / np.asarray(half - freq_shift, dtype))
    angles = timesteps.astype(dtype)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the timestep sinusoids: (B, C) -> (B, features)."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="linear_2")(nn.silu(nn.Dense(self.features, name="linear_1")(x)))


class Attention(nn.Module):
    """Multi-head attention of (B, Q, C) to a text (B or 1, L, D), or to itself if that is None -> (B, Q, C).

    Keys and values are functions of the text and the parameters alone: one text for all images is projected once, or
    they come projected in `text`.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x, text: ProjectedText | None = None):
        features = x.shape[-1]
        states, projections = ProjectedText(x, {}) if text is None else text

        def project(name):
            if name in projections:
                projected = projections[name]["kernel"]
            else:
                projected = nn.Dense(features, use_bias=False, name=name)(states)
            # A bfloat16 run may project float32 text (`cast_params`) and rounds after the product.
            return projected.astype(query.dtype)

        query = nn.Dense(features, use_bias=False, name="to_q")(x)
        # The callers bound the batch.
        at_once = LOGITS_AT_ONCE * len(x)
        mixed = attention(query, project("to_k"), project("to_v"), self.num_heads, logits_at_once=at_once)
        return nn.Dense(features, name="to_out_0")(mixed)


class GEGLU(nn.Module):
    """Gated linear unit with the exact (erf) GELU: (..., C) -> (..., features)."""

    features: int

    @nn.compact
    def __call__(self, x):
        hidden, gate = jnp.split(nn.Dense(2 * self.features, name="proj")(x), 2, axis=-1)
        # As PyTorch has it. `nn.gelu` takes the complement of erf, which costs several times as much on a CPU.
        return hidden * (0.5 * gate * (1 + jax.lax.erf(gate * 2**-0.5)))


class FeedForward(nn.Module):
    """The transformer's position-wise network, four times as wide inside: (B, Q, C) -> (B, Q, C)."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="net_2")(GEGLU(4 * x.shape[-1], name="net_0")(x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each on normed input and added to (B, Q, C)."""

    num_heads: int

    @nn.compact
    def __call__(self, x, text):
        x = x + Attention(self.num_heads, name="attn1")(LayerNorm(name="norm1")(x))
        x = x + Attention(self.num_heads, name="attn2")(LayerNorm(name="norm2")(x), text.within("attn2"))
        return x + FeedForward(name="ff")(LayerNorm(name="norm3")(x))


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel on the pixels of (B, H, W, C), with text (B, L, D) -> (B, H, W, C)."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(self, x, text):
        config = self.config
        batch, height, width, channels = x.shape

        def project(pixels, name):
            if config.use_linear_projection:
                return nn.Dense(channels, name=name)(pixels)
            return pointwise_conv(channels, name)(pixels)

        hidden = GroupNorm(config.norm_num_groups, _TRANSFORMER_NORM_EPS, name="norm")(x)
        hidden = project(hidden, "proj_in").reshape(batch, height * width, channels)
        for index in range(config.per_level("transformer_layers_per_block")[self.level]):
            heads = config.per_level("attention_head_dim")[self.level]
            name = f"transformer_blocks_{index}"
            hidden = TransformerBlock(heads, name=name)(hidden, text.within(name))
        return x + project(hidden.reshape(x.shape), "proj_out")


def _resnet(config: UNetConfig, level: int, index: int) -> ResnetBlock:
    channels = config.block_out_channels[level]
    return ResnetBlock(channels, config.norm_num_groups, config.norm_eps, name=f"resnets_{index}")


class DownBlock(nn.Module):
    """DownBlock2D or CrossAttnDownBlock2D of one level; also returns every state that an up block will take."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(self, x, time_embedding, text):
        config, level = self.config, self.level
        states = []
        for index in range(config.per_level("layers_per_block")[level]):
            x = _resnet(config, level, index)(x, time_embedding)
            if _DOWN_BLOCKS[config.down_block_types[level]]:
                name = f"attentions_{index}"
                x = SpatialTransformer(config, level, name=name)(x, text.within(name))
            states.append(x)
        if level + 1 < len(config.block_out_channels):
            x = Downsample(config.block_out_channels[level], ((1, 1), (1, 1)), name="downsamplers_0")(x)
            states.append(x)
        return x, states


class MidBlock(nn.Module):
    """UNetMidBlock2DCrossAttn at the innermost level."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x, time_embedding, text):
        level = len(self.config.block_out_channels) - 1
        x = _resnet(self.config, level, 0)(x, time_embedding)
        x = SpatialTransformer(self.config, level, name="attentions_0")(x, text.within("attentions_0"))
        return _resnet(self.config, level, 1)(x, time_embedding)


class UpBlock(nn.Module):
    """UpBlock2D or CrossAttnUpBlock2D number `index`; `skips` are the down states that it joins, in that order."""

    config: UNetConfig
    index: int

    @nn.compact
    def __call__(self, x, skips, time_embedding, text, upsample_size: tuple[int, int] | None):
        config = self.config
        level = len(config.block_out_channels) - 1 - self.index
        for index, skip in enumerate(skips):
            x = _resnet(config, level, index)(jnp.concatenate([x, skip], axis=-1), time_embedding)
            if _UP_BLOCKS[config.up_block_types[self.index]]:
                name = f"attentions_{index}"
                x = SpatialTransformer(config, level, name=name)(x, text.within(name))
        if upsample_size is not None:
            x = Upsample(config.block_out_channels[level], name="upsamplers_0")(x, upsample_size)
        return x


def empty_conditioning(config: UNetConfig, batch: int, tokens: int) -> Any:
    """Zeros in the layout of the conditioning of a UNet, see `UNet2DConditionModel`."""
    text = jnp.zeros((batch, tokens, config.cross_attention_dim))
    if config.pooled_width is None:
        return text
    return {"text": text, "pooled": jnp.zeros((batch, config.pooled_width)), "ids": jnp.zeros((batch, SIZE_IDS))}


class UNet2DConditionModel(nn.Module):
    """The text-conditioned denoiser: `module.apply({"params": params}, latents, timesteps, text)`.

    Dropout is not part of it: the forward is diffusers' in evaluation mode.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, latents, timesteps, conditioning):
        """Predicts noise or velocity, whichever the model was trained for.

        Args:
          latents: (B, h, w, in_channels) noisy latents of any size, float32; float64 latents or parameters give a
            float64 forward, timestep sinusoids included.
          timesteps: (B,) or (), integers or floats.
          conditioning: (B, L, cross_attention_dim) text states or `ProjectedText` of them; (1, L, ...) is that of all
            latents. For SDXL (`addition_embed_type` "text_time") a dict of these as "text", of the "pooled" text
            (B or 1, p), and of the size "ids" (B or 1, 6): height and width of the original image, top and left of the
            crop, height and width of the target, in pixels.

        Returns:
          (B, h, w, out_channels).
        """
        config = self.config
        if latents.ndim != 4 or latents.shape[-1] != config.in_channels:
            raise ValueError(f"latents has shape {latents.shape}: expected (B, h, w, {config.in_channels}).")
        is_dict = isinstance(conditioning, Mapping)
        if is_dict != (config.pooled_width is not None) or (is_dict and {*conditioning} != {"text", "pooled", "ids"}):
            found = sorted(conditioning) if is_dict else "text states alone"
            expected = "text states alone" if config.pooled_width is None else "a dict of text, pooled and ids"
            raise ValueError(f"conditioning is {found}: expected {expected}.")
        text = conditioning["text"] if is_dict else conditioning
        text = text if isinstance(text, ProjectedText) else ProjectedText(text, {})
        shape, size = text.rows.shape, len(latents)
        if len(shape) != 3 or shape[-1] != config.cross_attention_dim or shape[0] not in (1, size):
            expected = f"(B, L, {config.cross_attention_dim}) with B = 1 or, as the latents, {size}"
            raise ValueError(f"text has shape {shape}: expected {expected}.")
        if config.center_input_sample:
            latents = 2 * latents - 1
        channels = config.block_out_channels
        x = Conv(channels[0], name="conv_in")(latents)

        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), latents.shape[:1])
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        sinusoids = timestep_sinusoids(timesteps, channels[0], config.flip_sin_to_cos, config.freq_shift, dtype)
        embedding_width = config.time_embedding_dim or 4 * channels[0]
        time_embedding = TimestepEmbedding(embedding_width, name="time_embedding")(sinusoids.astype(x.dtype))
        if is_dict:
            pooled, ids = conditioning["pooled"], conditioning["ids"]
            for name, array, width in (("pooled", pooled, config.pooled_width), ("ids", ids, SIZE_IDS)):
                if array.ndim != 2 or array.shape[0] not in (1, size) or array.shape[1] != width:
                    expected = f"(B, {width}) with B = 1 or, as the latents, {size}"
                    raise ValueError(f"{name} has shape {array.shape}: expected {expected}.")
            options = config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift, dtype
            sizes = timestep_sinusoids(ids.reshape(-1), *options).reshape(len(ids), -1)
            sizes, pooled = (
                jnp.broadcast_to(part, (max(len(ids), len(pooled)), part.shape[1])) for part in (sizes, pooled)
            )
            additions = jnp.concatenate([pooled.astype(x.dtype), sizes.astype(x.dtype)], axis=-1)
            time_embedding = time_embedding + TimestepEmbedding(embedding_width, name="add_embedding")(additions)

        skips = [x]
        for level in range(len(channels)):
            name = f"down_blocks_{level}"
            x, states = DownBlock(config, level, name=name)(x, time_embedding, text.within(name))
            skips += states
        x = MidBlock(config, name="mid_block")(x, time_embedding, text.within("mid_block"))
        for index, layers in enumerate(reversed(config.per_level("layers_per_block"))):
            taken = [skips.pop() for _ in range(layers + 1)]
            # The next skip gives the size to grow to: twice this one, less 1 where the down block rounded up.
            size = skips[-1].shape[1:3] if skips else None
            name = f"up_blocks_{index}"
            x = UpBlock(config, index, name=name)(x, taken, time_embedding, text.within(name), size)

        x = nn.silu(GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(x))
        return Conv(config.out_channels, name="conv_out")(x)
