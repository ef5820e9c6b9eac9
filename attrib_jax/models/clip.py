"""The CLIP text encoders of Stable Diffusion: transformers' CLIPTextModel and CLIPTextModelWithProjection in Flax.

Their encoder is the vision tower's too (clip_towers.py), whose config has the same names for the same things.

Parameter names follow transformers' with the `text_model` level that published checkpoints carry, and initial values
its standard deviations, so that an encoder can be trained from scratch.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attrib_jax.models.layers import LayerNorm
from attrib_jax.ops import attention


def _quick_gelu(x):
    return x * nn.sigmoid(1.702 * x)


# The end token's id in configs from before it was stored rightly: then the largest id of a text is its end.
_OLD_EOS = 2
ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": functools.partial(nn.gelu, approximate=False)}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The options of a transformers CLIPTextModel config.json that this port reads, with transformers' defaults.

    The last four do not enter the forward pass of a model without projection; they are kept for the readers of the
    written config.json.
    """

    ARCHITECTURE: ClassVar[str] = "CLIPTextModel"

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
        architectures = config.get("architectures") or [cls.ARCHITECTURE]
        if cls.ARCHITECTURE not in architectures and {"CLIPTextModel", "CLIPTextModelWithProjection"} & {
            *architectures
        }:
            raise ValueError(f"text encoder config has architectures={architectures!r}; expected {[cls.ARCHITECTURE]}")
        # diffusers' pipelines then mask the padding.
        if config.get("use_attention_mask"):
            raise ValueError(
                f"text encoder config has use_attention_mask={config['use_attention_mask']!r}; supported: False"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' class reads."""
        return {"architectures": [self.ARCHITECTURE], "model_type": "clip_text_model", **vars(self)}

    def end_positions(self, input_ids: jax.Array) -> jax.Array:
        """input_ids (B, L) -> (B,) position of the first end token of each."""
        is_end = input_ids if self.eos_token_id == _OLD_EOS else input_ids == self.eos_token_id
        return jnp.argmax(is_end, axis=-1)


@dataclasses.dataclass(frozen=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
    """The same of a transformers CLIPTextModelWithProjection, whose `projection_dim` and `eos_token_id` take part."""

    ARCHITECTURE: ClassVar[str] = "CLIPTextModelWithProjection"

    def __post_init__(self):
        super().__post_init__()
        if not self.projection_dim:
            raise ValueError(f"text encoder config has projection_dim={self.projection_dim!r}; expected its width")


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


class EncoderStates(NamedTuple):
    """(B, L, d) after the last layer of an encoder, and before it."""

    last: jax.Array
    penultimate: jax.Array


class CLIPEncoder(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x, mask) -> EncoderStates:
        penultimate = x
        for i in range(self.config.num_hidden_layers):
            penultimate, x = x, CLIPEncoderLayer(self.config, name=f"layers_{i}")(x, mask)
        return EncoderStates(x, penultimate)


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
    def __call__(self, input_ids) -> EncoderStates:
        """The last state is normed by `final_layer_norm`, the penultimate one is not."""
        length, limit = input_ids.shape[-1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"input_ids has {length} tokens a prompt; the text encoder has {limit} positions")
        if not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; expected int32")
        x = CLIPTextEmbeddings(self.config, name="embeddings")(input_ids)
        mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0, jnp.finfo(x.dtype).min).astype(x.dtype)
        states = CLIPEncoder(self.config, name="encoder")(x, mask)
        last = LayerNorm(self.config.layer_norm_eps, name="final_layer_norm")(states.last)
        return states._replace(last=last)


class CLIPTextModel(nn.Module):
    """input_ids (B, L) int32 -> text states (B, L, hidden_size): the last hidden state after `final_layer_norm`.

    Attention is causal and padding is not masked, as Stable Diffusion uses it.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, input_ids, penultimate: bool = False) -> jax.Array:
        """The text states; with `penultimate` those before the last layer, without a norm, as SDXL uses them.

        Raises ValueError for more tokens than `config.max_position_embeddings`, or ids that are no integers.
        """
        states = CLIPTextTransformer(self.config, name="text_model")(input_ids)
        return states.penultimate if penultimate else states.last


class ProjectedStates(NamedTuple):
    """Text states before the last layer (B, L, hidden_size), and the projected state of each text's end (B, p)."""

    penultimate: jax.Array
    pooled: jax.Array


class CLIPTextModelWithProjection(nn.Module):
    """input_ids (B, L) int32 -> `ProjectedStates`, as Stable Diffusion XL uses its second text encoder."""

    config: CLIPTextProjectionConfig

    @nn.compact
    def __call__(self, input_ids) -> ProjectedStates:
        """Raises ValueError as `CLIPTextModel`."""
        config = self.config
        states = CLIPTextTransformer(config, name="text_model")(input_ids)
        ends = states.last[jnp.arange(len(input_ids)), config.end_positions(input_ids)]
        init = nn.initializers.normal(config.hidden_size**-0.5)
        project = nn.Dense(config.projection_dim, use_bias=False, kernel_init=init, name="text_projection")
        return ProjectedStates(states.penultimate, project(ends))
