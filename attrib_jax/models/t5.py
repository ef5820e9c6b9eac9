"""transformers' T5EncoderModel: the text encoder of PixArt, SD 3 and FLUX (T5 v1.1), in Flax."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.models.dit_layers import RMSNorm, check_counts, gelu

_ARCHITECTURE = "T5EncoderModel"
_FAMILY = "T5"
# What transformers calls `gelu_new` is the tanh form.
_ACTIVATIONS = {"gated-gelu": gelu, "relu": nn.relu}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The options of a transformers T5 config.json that this port reads, with transformers' defaults.

    Attributes:
      vocab_size: tokens.
      d_model: width of the text states.
      d_kv, num_heads: width and number of the heads, whose product need not be `d_model`.
      d_ff: width inside the feed-forward network.
      num_layers: blocks.
      relative_attention_num_buckets, relative_attention_max_distance: of the relative positions.
      layer_norm_epsilon: of every norm.
      feed_forward_proj: "gated-gelu" (v1.1) or "relu".
      pad_token_id, eos_token_id: kept for the readers of the written config.json.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self):
        names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        check_counts(_FAMILY, self, *names, "relative_attention_num_buckets", "relative_attention_max_distance")
        if self.feed_forward_proj not in _ACTIVATIONS:
            raise ValueError(
                f"{_FAMILY} config: feed_forward_proj={self.feed_forward_proj!r}; supported: {sorted(_ACTIVATIONS)}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads a config.json; raises ValueError for another model class."""
        model_type = config.get("model_type", "t5")
        if model_type != "t5":
            raise ValueError(f"{_FAMILY} config: model_type={model_type!r}; supported: 't5'")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' T5EncoderModel reads."""
        return {"architectures": [_ARCHITECTURE], "model_type": "t5", "is_encoder_decoder": True, **vars(self)}


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each pair (query, key) of positions, (length, length) int32: arXiv 1910.10683, section 2.1.

    Half of the buckets are for keys after the query. Of each half, half is for single distances, and the others are
    logarithmic up to `max_distance`. In float32, as transformers.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    with np.errstate(divide="ignore"):
        ratio = np.log(size.astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + np.where(size < exact, 0, ratio * np.float32(half - exact)).astype(np.int32)
    return (np.where(size < exact, size, np.minimum(far, half - 1)) + half * (distance > 0)).astype(np.int32)


def _linear(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, name=name)


class _SelfAttention(nn.Module):
    config: T5Config
    makes_bias: bool

    @nn.compact
    def __call__(self, x, bias):
        """(B, L, D) -> the same and the relative position bias (heads, L, L), made by the first layer for all."""
        config = self.config
        batch, length, width = x.shape
        heads, head_width = config.num_heads, config.d_kv
        query, key, value = (
            _linear(heads * head_width, name)(x).reshape(batch, length, heads, head_width) for name in ("q", "k", "v")
        )
        if self.makes_bias:
            buckets = relative_buckets(
                length, config.relative_attention_num_buckets, config.relative_attention_max_distance
            )
            table = nn.Embed(config.relative_attention_num_buckets, heads, name="relative_attention_bias")
            bias = bias + jnp.moveaxis(table(buckets), -1, 0)
        # Logits are not divided by the root of the head's width.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide) + bias
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, -1)
        return _linear(width, "o")(mixed), bias


class _AttentionLayer(nn.Module):
    config: T5Config
    makes_bias: bool

    @nn.compact
    def __call__(self, x, bias):
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        attended, bias = _SelfAttention(self.config, self.makes_bias, name="SelfAttention")(normed, bias)
        return x + attended, bias


class _Dense(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        activation = _ACTIVATIONS[config.feed_forward_proj]
        if config.feed_forward_proj.startswith("gated"):
            hidden = activation(_linear(config.d_ff, "wi_0")(x)) * _linear(config.d_ff, "wi_1")(x)
        else:
            hidden = activation(_linear(config.d_ff, "wi")(x))
        return _linear(config.d_model, "wo")(hidden)


class _FeedForwardLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        normed = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        return x + _Dense(self.config, name="DenseReluDense")(normed)


class _Block(nn.Module):
    config: T5Config
    makes_bias: bool

    @nn.compact
    def __call__(self, x, bias):
        x, bias = _AttentionLayer(self.config, self.makes_bias, name="layer_0")(x, bias)
        return _FeedForwardLayer(self.config, name="layer_1")(x), bias


class _Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, bias):
        for index in range(self.config.num_layers):
            x, bias = _Block(self.config, makes_bias=index == 0, name=f"block_{index}")(x, bias)
        return RMSNorm(self.config.layer_norm_epsilon, name="final_layer_norm")(x)


class T5EncoderModel(nn.Module):
    """input_ids (B, L) int32 and a mask -> text states (B, L, d_model)."""

    config: T5Config

    @nn.compact
    def __call__(self, input_ids, mask=None) -> jax.Array:
        """`mask` (B, L) is 1 for a token and 0 for padding, which is left out as a key; None masks nothing.

        PixArt masks padding, SD 3 and FLUX do not. Raises ValueError for ids that are no integers.
        """
        if not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; expected int32")
        x = nn.Embed(self.config.vocab_size, self.config.d_model, name="shared")(input_ids)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        bias = jnp.zeros((1, 1, 1, 1), wide)
        if mask is not None:
            bias = jnp.where(mask[:, None, None].astype(bool), bias, jnp.finfo(wide).min)
        return _Encoder(self.config, name="encoder")(x, bias)
