"""The CLIP text encoder of Stable Diffusion: transformers' CLIPTextModel as a Flax module.

Its encoder is the vision tower's too (clip_towers.py), whose config has the same names for the same things.

Parameter names follow transformers' with the `text_model` level that published checkpoints carry, and initial values
its standard deviations, so that an encoder can be trained from scratch.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attrib_jax.models.layers import LayerNorm
from attrib_jax.ops import attention


def _quick_gelu(x):
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": functools.partial(nn.gelu, approximate=False)}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The options of a transformers CLIPTextModel config.json that this port reads, with transformers' defaults.

    The last four do not enter the forward pass; they are kept for the readers of the written config.json.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"text encoder config has hidden_act={self.hidden_act!r}; supported: {sorted(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text encoder config has hidden_size={self.hidden_size}, which num_attention_heads="
                f"{self.num_attention_heads} does not divide"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "CLIPTextConfig":
        """Reads a config.json; raises ValueError for another model class or an option that this port lacks."""
        model_type = config.get("model_type", "clip_text_model")
        if model_type != "clip_text_model":
            raise ValueError(f"text encoder config has model_type={model_type!r}; supported: 'clip_text_model'")
        architectures = config.get("architectures") or ["CLIPTextModel"]
        if "CLIPTextModelWithProjection" in architectures:
            raise ValueError(f"text encoder config has architectures={architectures!r}; supported: ['CLIPTextModel']")
        # diffusers' pipelines then mask the padding.
        if config.get("use_attention_mask"):
            raise ValueError(
                f"text encoder config has use_attention_mask={config['use_attention_mask']!r}; supported: False"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' CLIPTextModel reads."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **vars(self)}


class CLIPAttention(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        width = config.hidden_size
        out_std = width**-0.5
        in_init = nn.initializers.normal(out_std * (2 * config.num_hidden_layers) ** -0.5)
        query, key, value = (
            nn.Dense(width, kernel_init=in_init, name=name)(x) for name in ("q_proj", "k_proj", "v_proj")
        )
        x = attention(query, key, value, config.num_attention_heads, mask)
        return nn.Dense(width, kernel_init=nn.initializers.normal(out_std), name="out_proj")(x)


class CLIPMLP(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        width = config.hidden_size
        out_std = (2 * width * config.num_hidden_layers) ** -0.5
        x = nn.Dense(config.intermediate_size, kernel_init=nn.initializers.normal((2 * width) ** -0.5), name="fc1")(x)
        x = ACTIVATIONS[config.hidden_act](x)
        return nn.Dense(width, kernel_init=nn.initializers.normal(out_std), name="fc2")(x)


class CLIPEncoderLayer(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x, mask):
        epsilon = self.config.layer_norm_eps
        x = x + CLIPAttention(self.config, name="self_attn")(LayerNorm(epsilon, name="layer_norm1")(x), mask)
        return x + CLIPMLP(self.config, name="mlp")(LayerNorm(epsilon, name="layer_norm2")(x))


class CLIPEncoder(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x, mask):
        for i in range(self.config.num_hidden_layers):
            x = CLIPEncoderLayer(self.config, name=f"layers_{i}")(x, mask)
        return x


class CLIPTextEmbeddings(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, input_ids):
        config = self.config
        embed = functools.partial(nn.Embed, features=config.hidden_size, embedding_init=nn.initializers.normal(0.02))
        tokens = embed(config.vocab_size, name="token_embedding")(input_ids)
        positions = jnp.arange(input_ids.shape[-1])
        return tokens + embed(config.max_position_embeddings, name="position_embedding")(positions)


class CLIPTextTransformer(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, input_ids):
        x = CLIPTextEmbeddings(self.config, name="embeddings")(input_ids)
        length = input_ids.shape[-1]
        mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0, jnp.finfo(x.dtype).min).astype(x.dtype)
        x = CLIPEncoder(self.config, name="encoder")(x, mask)
        return LayerNorm(self.config.layer_norm_eps, name="final_layer_norm")(x)


class CLIPTextModel(nn.Module):
    """input_ids (B, L) int32 -> text states (B, L, hidden_size): the last hidden state after `final_layer_norm`.

    Attention is causal and padding is not masked, as Stable Diffusion uses it.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, input_ids) -> jax.Array:
        """Raises ValueError for more tokens than `config.max_position_embeddings`, or ids that are no integers."""
        length, limit = input_ids.shape[-1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"input_ids has {length} tokens a prompt; the text encoder has {limit} positions")
        if not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; expected int32")
        return CLIPTextTransformer(self.config, name="text_model")(input_ids)
