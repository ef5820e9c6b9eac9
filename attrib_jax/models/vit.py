"""Vision transformers: transformers' ViTModel (DINO) and Dinov2WithRegistersModel (DINOv2) as Flax modules.

Parameter names are those of the published files. The feature of an image is the class token's last state.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from attrib_jax.core.checks import check_positive
from attrib_jax.models.clip import ACTIVATIONS
from attrib_jax.models.layers import LayerNorm
from attrib_jax.ops import attention

_INIT = nn.initializers.truncated_normal(0.02)


def check_vision_config(config: Any) -> None:
    """Raises ValueError for sizes and activations of a vision tower's config that cannot be."""
    name = f"{config.MODEL_TYPE} config"
    for field in ("hidden_size", "num_attention_heads", "image_size", "patch_size"):
        check_positive(f"{name}: {field}", getattr(config, field), integer=True)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{name} has hidden_act={config.hidden_act!r}; supported: {sorted(ACTIVATIONS)}")
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"{name} has {whole}={getattr(config, whole)}, which {part}={getattr(config, part)} does not divide"
            )


def known_fields(cls: type, config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The entries of a config.json that `cls` has; raises ValueError for another model class or colour channels."""
    found = config.get("model_type", model_type)
    if found != model_type:
        raise ValueError(f"config has model_type={found!r}; expected {model_type!r}")
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"config has num_channels={config['num_channels']!r}; supported: 3")
    known = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in config.items() if key in known}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The options of a transformers ViTModel config.json that this port reads, with transformers' defaults."""

    MODEL_TYPE: ClassVar[str] = "vit"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    qkv_bias: bool = True

    def __post_init__(self):
        check_vision_config(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ViTConfig":
        """Reads a config.json; raises ValueError for another model class or options that this port lacks."""
        return cls(**known_fields(cls, config, cls.MODEL_TYPE))


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The options of a transformers Dinov2WithRegistersModel config.json that this port reads, and its defaults."""

    MODEL_TYPE: ClassVar[str] = "dinov2_with_registers"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16
    qkv_bias: bool = True
    num_register_tokens: int = 4
    use_swiglu_ffn: bool = False

    def __post_init__(self):
        check_vision_config(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Dinov2Config":
        """Reads a config.json; raises ValueError for another model class or options that this port lacks."""
        return cls(**known_fields(cls, config, cls.MODEL_TYPE))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel's size, as one product: (B, H, W, C) -> (B, H/p * W/p, features)."""

    features: int
    patch_size: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, images):
        size = self.patch_size
        batch, height, width, channels = images.shape
        if height % size or width % size:
            raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {size}")
        kernel = self.param("kernel", _INIT, (size, size, channels, self.features))
        images, kernel = promote_dtype(images, kernel)
        patches = images.reshape(batch, height // size, size, width // size, size, channels)
        patches = jnp.swapaxes(patches, 2, 3).reshape(batch, -1, size * size * channels)
        x = patches @ kernel.reshape(-1, self.features)
        return x + self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else x


class _Named(nn.Module):
    """A linear layer one level down, as published names have it: `<name>/dense`."""

    features: int
    inner: str = "dense"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, kernel_init=_INIT, name=self.inner)(x)


class _PatchEmbeddings(nn.Module):
    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, pixels):
        return PatchEmbedding(self.config.hidden_size, self.config.patch_size, name="projection")(pixels)


class _Embeddings(nn.Module):
    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, pixels):
        config, width = self.config, self.config.hidden_size
        x = _PatchEmbeddings(config, name="patch_embeddings")(pixels)
        grid = config.image_size // config.patch_size
        cls = self.param("cls_token", _INIT, (1, 1, width))
        positions = self.param("position_embeddings", _INIT, (1, grid * grid + 1, width))
        if isinstance(config, Dinov2Config):
            size = (pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size)
            positions = resize_positions(positions, size)
        tokens = [jnp.broadcast_to(cls, (len(x), 1, width)) + positions[:, :1]]
        if isinstance(config, Dinov2Config) and config.num_register_tokens:
            registers = self.param(
                "register_tokens", nn.initializers.zeros_init(), (1, config.num_register_tokens, width)
            )
            tokens.append(jnp.broadcast_to(registers, (len(x), *registers.shape[1:])))
        return jnp.concatenate([*tokens, x + positions[:, 1:]], axis=1)


def resize_positions(positions: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Position embeddings (1, 1 + g * g, D) of a square grid for another grid: (1, 1 + h * w, D).

    By bicubic interpolation with antialiasing, as DINOv2 with registers does it; the class token's is kept.
    """
    _, count, width = positions.shape
    grid = round((count - 1) ** 0.5)
    if size == (grid, grid):
        return positions
    patches = positions[0, 1:].reshape(grid, grid, width)
    resized = jax.image.resize(patches, (*size, width), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :1], resized.reshape(1, -1, width)], axis=1)


class _SelfAttention(nn.Module):
    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        query, key, value = (
            nn.Dense(config.hidden_size, use_bias=config.qkv_bias, kernel_init=_INIT, name=name)(x)
            for name in ("query", "key", "value")
        )
        return attention(query, key, value, config.num_attention_heads)


class _Attention(nn.Module):
    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, x):
        x = _SelfAttention(self.config, name="attention")(x)
        return _Named(self.config.hidden_size, name="output")(x)


class _ViTLayer(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = x + _Attention(config, name="attention")(LayerNorm(config.layer_norm_eps, name="layernorm_before")(x))
        hidden = LayerNorm(config.layer_norm_eps, name="layernorm_after")(x)
        hidden = ACTIVATIONS[config.hidden_act](_Named(config.intermediate_size, name="intermediate")(hidden))
        return x + _Named(config.hidden_size, name="output")(hidden)


class _LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("lambda1", nn.initializers.ones_init(), (x.shape[-1],))


class _Dinov2MLP(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        hidden = int(config.hidden_size * config.mlp_ratio)
        if config.use_swiglu_ffn:
            # Two thirds of the width, rounded up to a multiple of 8; gate and value in one matrix.
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
            gate, value = jnp.split(nn.Dense(2 * hidden, kernel_init=_INIT, name="weights_in")(x), 2, axis=-1)
            return nn.Dense(config.hidden_size, kernel_init=_INIT, name="weights_out")(nn.silu(gate) * value)
        x = ACTIVATIONS[config.hidden_act](nn.Dense(hidden, kernel_init=_INIT, name="fc1")(x))
        return nn.Dense(config.hidden_size, kernel_init=_INIT, name="fc2")(x)


class _Dinov2Layer(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        hidden = _Attention(config, name="attention")(LayerNorm(config.layer_norm_eps, name="norm1")(x))
        x = x + _LayerScale(name="layer_scale1")(hidden)
        hidden = _Dinov2MLP(config, name="mlp")(LayerNorm(config.layer_norm_eps, name="norm2")(x))
        return x + _LayerScale(name="layer_scale2")(hidden)


class _Encoder(nn.Module):
    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, x):
        layer = _Dinov2Layer if isinstance(self.config, Dinov2Config) else _ViTLayer
        for i in range(self.config.num_hidden_layers):
            x = layer(self.config, name=f"layer_{i}")(x)
        return x


class VisionTransformer(nn.Module):
    """Normalised images (B, H, W, 3) -> states (B, tokens, hidden_size) after the last norm, the class token first.

    A ViT takes images of `config.image_size` alone; DINOv2 resizes its position embeddings to any image whose sides
    are multiples of `config.patch_size`.
    """

    config: ViTConfig | Dinov2Config

    @nn.compact
    def __call__(self, pixels) -> jax.Array:
        """Raises ValueError for images of a size that the model does not take."""
        side = self.config.image_size
        if isinstance(self.config, ViTConfig) and pixels.shape[1:3] != (side, side):
            raise ValueError(f"pixels has shape {pixels.shape}; the model takes (B, {side}, {side}, 3)")
        x = _Encoder(self.config, name="encoder")(_Embeddings(self.config, name="embeddings")(pixels))
        return LayerNorm(self.config.layer_norm_eps, name="layernorm")(x)

    @nn.nowrap
    def feature_width(self) -> int:
        """Width of `image_features`."""
        return self.config.hidden_size

    def image_features(self, pixels) -> jax.Array:
        """Normalised images (B, H, W, 3) -> features (B, hidden_size): the class token's states."""
        return self(pixels)[:, 0]
