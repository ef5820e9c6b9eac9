"""CLIP: the text and vision towers with their projections, transformers' CLIPModel as a Flax module.

Also either half alone, CLIPVisionModelWithProjection and CLIPTextModelWithProjection. Parameter names and initial
values follow transformers'.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from attrib_jax.models.clip import CLIPEncoder, CLIPTextConfig, CLIPTextTransformer
from attrib_jax.models.layers import LayerNorm
from attrib_jax.models.vit import PatchEmbedding, check_vision_config, known_fields

_FIRST_LOGIT_SCALE = 2.6592  # log(1 / 0.07), CLIP's


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The options of a transformers CLIPVisionConfig that this port reads, with transformers' defaults."""

    MODEL_TYPE: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self):
        check_vision_config(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "CLIPVisionConfig":
        """Reads a vision config; raises ValueError for another model class or options that this port lacks."""
        return cls(**known_fields(cls, config, cls.MODEL_TYPE))


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A CLIP model: one or both towers, and the width of the space that they share.

    Attributes:
      text, vision: the towers' configs; None for one that the model lacks.
      projection_dim: width of the features.
    """

    text: CLIPTextConfig | None
    vision: CLIPVisionConfig | None
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "CLIPConfig":
        """Reads the config.json of a CLIPModel, or of one tower with its projection; ValueError for other models."""
        model_type = config.get("model_type", "clip")
        width = config.get("projection_dim", 512)
        if model_type == "clip":
            # The half's own projection_dim is not read by anyone: published files leave it at the default.
            text = CLIPTextConfig.from_dict(_plain(config.get("text_config")) | {"projection_dim": width})
            return cls(text, CLIPVisionConfig.from_dict(_plain(config.get("vision_config"))), width)
        if model_type == "clip_text_model":
            _check_projection(config, "CLIPTextModelWithProjection")
            return cls(CLIPTextConfig.from_dict(_plain(config)), None, width)
        if model_type == "clip_vision_model":
            _check_projection(config, "CLIPVisionModelWithProjection")
            return cls(None, CLIPVisionConfig.from_dict(_plain(config)), width)
        raise ValueError(
            f"config has model_type={model_type!r}; expected 'clip', 'clip_text_model' or 'clip_vision_model'"
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' CLIPModel reads; of a model with both towers."""
        text = self.text.to_dict() | {"projection_dim": self.projection_dim}
        del text["architectures"]
        vision = {"model_type": self.vision.MODEL_TYPE, "projection_dim": self.projection_dim, **vars(self.vision)}
        return {
            "architectures": ["CLIPModel"],
            "logit_scale_init_value": _FIRST_LOGIT_SCALE,
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "text_config": text,
            "vision_config": vision,
        }


def _plain(config: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (config or {}).items() if key != "architectures"}


def _check_projection(config: dict[str, Any], needed: str) -> None:
    found = config.get("architectures") or []
    if needed not in found:
        raise ValueError(f"config has architectures={found!r}; expected {needed!r} or 'CLIPModel', which project")


class _VisionEmbeddings(nn.Module):
    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels):
        config, width = self.config, self.config.hidden_size
        normal = nn.initializers.normal
        patches = PatchEmbedding(width, config.patch_size, use_bias=False, name="patch_embedding")(pixels)
        cls = self.param("class_embedding", normal(width**-0.5), (width,))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(patches), 1, width)), patches], axis=1)
        count = (config.image_size // config.patch_size) ** 2 + 1
        positions = nn.Embed(count, width, embedding_init=normal(0.02), name="position_embedding")
        return x + positions(jnp.arange(count))


class CLIPVisionTransformer(nn.Module):
    """Normalised images (B, image_size, image_size, 3) -> the class token's state (B, hidden_size), normed."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels):
        epsilon = self.config.layer_norm_eps
        x = _VisionEmbeddings(self.config, name="embeddings")(pixels)
        x = CLIPEncoder(self.config, name="encoder")(LayerNorm(epsilon, name="pre_layrnorm")(x), None).last
        return LayerNorm(epsilon, name="post_layernorm")(x[:, 0])


class CLIPModel(nn.Module):
    """Images and texts in one space; see `image_features` and `text_features`."""

    config: CLIPConfig

    def setup(self):
        config = self.config
        project = functools.partial(nn.Dense, config.projection_dim, use_bias=False)
        if config.text is not None:
            self.text_model = CLIPTextTransformer(config.text)
            self.text_projection = project(kernel_init=nn.initializers.normal(config.text.hidden_size**-0.5))
        if config.vision is not None:
            self.vision_model = CLIPVisionTransformer(config.vision)
            self.visual_projection = project(kernel_init=nn.initializers.normal(config.vision.hidden_size**-0.5))
        if config.text is not None and config.vision is not None:
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(_FIRST_LOGIT_SCALE), ())

    def __call__(self, pixels, input_ids) -> tuple[jax.Array | None, jax.Array | None]:
        """Both features; None for a tower that the model lacks."""
        return (
            None if self.config.vision is None else self.image_features(pixels),
            None if self.config.text is None else self.text_features(input_ids),
        )

    @nn.nowrap
    def feature_width(self) -> int:
        """Width of both features."""
        return self.config.projection_dim

    def image_features(self, pixels) -> jax.Array:
        """Normalised images (B, image_size, image_size, 3) -> projected features (B, projection_dim).

        Raises ValueError for images of another size, or a model without its vision tower.
        """
        if self.config.vision is None:
            raise ValueError("this CLIP model has a text tower alone; load one with a vision tower")
        side = self.config.vision.image_size
        if pixels.shape[1:3] != (side, side):
            raise ValueError(f"pixels has shape {pixels.shape}; the model takes (B, {side}, {side}, 3)")
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, input_ids) -> jax.Array:
        """Tokens (B, L) int32 -> projected features (B, projection_dim), of the state at each text's first end token.

        Raises ValueError for a model without its text tower.
        """
        if self.config.text is None:
            raise ValueError("this CLIP model has a vision tower alone; load one with a text tower")
        states = self.text_model(input_ids).last
        return self.text_projection(states[jnp.arange(len(states)), self.config.text.end_positions(input_ids)])
