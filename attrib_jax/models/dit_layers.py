"""Layers that the diffusion transformers share (SD 3, FLUX, PixArt), named as their diffusers counterparts.

Tokens are (B, N, D) and embeddings of the timestep (B, D). Layers compute in the promoted dtype of their input and
parameters; norms and softmax are float32 at least.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from attrib_jax.models.layers import Conv
from attrib_jax.models.unet import TimestepEmbedding, timestep_sinusoids
from attrib_jax.ops import attention, layer_norm, rms_norm
from attrib_jax.ops.attention import LOGITS_AT_ONCE

_EPSILON = 1e-6  # of every norm
_TIMESTEP_FEATURES = 256

gelu = functools.partial(nn.gelu, approximate=True)


def read_options(config_class: Any, config: Mapping[str, Any], fixed: Mapping[str, Any], family: str) -> Any:
    """A config dataclass from a diffusers config.json; absent keys take the dataclass's defaults, which are diffusers'.

    Args:
      config_class: the dataclass.
      config: content of the file.
      fixed: option -> the one value that is implemented, also that of an absent key.
      family: what error messages call the model.

    Raises ValueError, naming the key and its value, for a fixed option with another value.
    """
    for key, supported in fixed.items():
        if config.get(key, supported) != supported:
            raise ValueError(f"{family} config: {key}={config[key]!r} is not supported, only {supported!r}")
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in names}
    return config_class(**values)


def check_counts(family: str, config: Any, *names: str) -> None:
    """Raises ValueError unless each of the fields `names` of `config` is a positive whole number."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{family} config: {name} must be a positive whole number, got {value!r}")


def options_of(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json from which diffusers builds the model of a config dataclass."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    return {"_class_name": class_name, **values}


def check_conditioning(
    conditioning: Mapping[str, Any], expected: Mapping[str, tuple[int | None, ...]], batch: int
) -> None:
    """Checks the arrays of a model's conditioning, each (B, *shape of one example) with B = `batch` or 1.

    Args:
      conditioning: name -> array.
      expected: name -> shape of one example; None stands for the number of text states.
      batch: number of latents.

    Raises ValueError, naming the entry, where one is missing, not known or misshaped.
    """
    if conditioning.keys() != expected.keys():
        raise ValueError(f"conditioning has the entries {sorted(conditioning)}; expected {sorted(expected)}")
    tokens = conditioning["text"].shape[1]
    for name, shape in expected.items():
        wanted = tuple(tokens if size is None else size for size in shape)
        found = tuple(conditioning[name].shape)
        if found not in ((1, *wanted), (batch, *wanted)):
            some = ", ".join(["B", *("L" if size is None else str(size) for size in shape)])
            raise ValueError(f"conditioning {name!r} has shape {found}: expected ({some}), with B = 1 or {batch}")


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, as torch.nn.RMSNorm."""

    epsilon: float = _EPSILON

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        return rms_norm(*promote_dtype(x, scale), self.epsilon)


def normalise(x: jax.Array) -> jax.Array:
    """Layer normalisation without weights over the last axis."""
    return layer_norm(x, jnp.ones((), x.dtype), jnp.zeros((), x.dtype), _EPSILON)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """(B, N, D) times 1 + scale plus shift, each (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """The vectors that diffusers' AdaLayerNorm classes take from an embedding (B, D): `count` arrays (B, D)."""

    count: int

    @nn.compact
    def __call__(self, embedding):
        width = embedding.shape[-1]
        return jnp.split(nn.Dense(self.count * width, name="linear")(nn.silu(embedding)), self.count, axis=-1)


class NormOut(nn.Module):
    """diffusers' AdaLayerNormContinuous without weights of its norm: scale first, then shift."""

    @nn.compact
    def __call__(self, x, embedding):
        scale, shift = jnp.split(nn.Dense(2 * x.shape[-1], name="linear")(nn.silu(embedding)), 2, axis=-1)
        return modulate(normalise(x), scale, shift)


class _Gelu(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return gelu(nn.Dense(self.features, name="proj")(x))


class FeedForward(nn.Module):
    """Position-wise network with the tanh GELU, four times as wide inside."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="net_2")(_Gelu(4 * x.shape[-1], name="net_0")(x))


class Projection(nn.Module):
    """Two linear layers with an activation between them: (..., D) -> (..., features)."""

    features: int
    activation: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="linear_2")(self.activation(nn.Dense(self.features, name="linear_1")(x)))


def embed_number(numbers: jax.Array, features: int, name: str, dtype: Any) -> jax.Array:
    """The embedding (B, features) of numbers (B,), by a TimestepEmbedding called `name` of the calling module."""
    wide = jnp.promote_types(dtype, jnp.float32)
    sinusoids = timestep_sinusoids(jnp.asarray(numbers), _TIMESTEP_FEATURES, dtype=wide)
    return TimestepEmbedding(features, name=name)(sinusoids.astype(dtype))


class TimeTextEmbedding(nn.Module):
    """The embedding of timestep (B,), pooled text (B, P) and guidance scale (B,), if given -> (B, features)."""

    features: int

    @nn.compact
    def __call__(self, timesteps, pooled, guidance, dtype):
        embedding = embed_number(timesteps, self.features, "timestep_embedder", dtype)
        if guidance is not None:
            embedding += embed_number(1000 * guidance, self.features, "guidance_embedder", dtype)
        return (embedding + Projection(self.features, nn.silu, name="text_embedder")(pooled)).astype(dtype)


class JointAttention(nn.Module):
    """Attention in which image tokens, and text tokens with projections of their own, are queries and keys of both.

    Attributes:
      num_heads: divisor of D.
      qk_norm: whether queries and keys are normalised by their root mean square within each head.
      text_output: whether the text is given its output back; if not, its queries are not used, but have parameters.
      image_output: whether the output has a projection of its own.
    """

    num_heads: int
    qk_norm: bool
    text_output: bool = True
    image_output: bool = True

    @nn.compact
    def __call__(self, image, text=None, rotation=None):
        """Image (B, N, D) and text (B, L, D) -> their outputs; the text's is None without one.

        `rotation` is (cosines, sines), each (L + N, head width), of the text's positions followed by the image's.
        """
        tokens = [self._project(image, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
        length = 0
        if text is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            projected = self._project(text, *names)
            if self.text_output:
                length = text.shape[1]
            else:
                projected = [projected[0][:, :0], *projected[1:]]
            tokens.insert(0, projected)
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in zip(*tokens, strict=True))
        if rotation is not None:
            query, key = self._rotate(query, rotation), self._rotate(key, rotation)
        # The callers bound the batch.
        at_once = LOGITS_AT_ONCE * len(query)
        mixed = attention(query, key, value, self.num_heads, logits_at_once=at_once)
        width = image.shape[-1]
        of_text, of_image = mixed[:, :length], mixed[:, length:]
        if self.image_output:
            of_image = nn.Dense(width, name="to_out_0")(of_image)
        return of_image, nn.Dense(width, name="to_add_out")(of_text) if length else None

    def _project(self, x, names, norms):
        # A bfloat16 run keeps some kernels in float32 (`cast_params`) and rounds after the product.
        query, key, value = (nn.Dense(x.shape[-1], name=name)(x).astype(x.dtype) for name in names)
        if self.qk_norm:
            query, key = (self._norm(x, name) for x, name in zip((query, key), norms, strict=True))
        return [query, key, value]

    def _norm(self, x, name):
        heads = x.reshape(*x.shape[:-1], self.num_heads, -1)
        return RMSNorm(name=name)(heads).reshape(x.shape)

    def _rotate(self, x, rotation):
        """Rotates the pairs of neighbouring channels in each head (arXiv 2104.09864) of (B, N, D)."""
        cosines, sines = (jnp.asarray(part)[:, None] for part in rotation)
        heads = x.reshape(*x.shape[:-1], self.num_heads, -1)
        real, imaginary = heads[..., ::2], heads[..., 1::2]
        turned = jnp.stack([-imaginary, real], axis=-1).reshape(heads.shape)
        return (heads * cosines + turned * sines).reshape(x.shape).astype(x.dtype)


class JointBlock(nn.Module):
    """A block of an MMDiT (arXiv 2403.03206): attention of image and text together, then a network for each.

    Attributes:
      num_heads, qk_norm: see `JointAttention`.
      text_output: whether the text leaves the block; not in the last one.
      dual_attention: whether the image also attends to itself alone, by `attn2`.
    """

    num_heads: int
    qk_norm: bool
    text_output: bool = True
    dual_attention: bool = False

    @nn.compact
    def __call__(self, image, text, embedding, rotation=None):
        """Image (B, N, D), text (B or 1, L, D) and embedding (B, D) -> image and text, which may be None."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = Modulation(
            9 if self.dual_attention else 6, name="norm1"
        )(embedding)
        normed = normalise(image)
        if self.text_output:
            text_shift, text_scale, text_gate, *text_mlp = Modulation(6, name="norm1_context")(embedding)
            normed_text = modulate(normalise(text), text_scale, text_shift)
        else:
            normed_text = NormOut(name="norm1_context")(text, embedding)
        attend = JointAttention(self.num_heads, self.qk_norm, text_output=self.text_output, name="attn")
        of_image, of_text = attend(modulate(normed, scale, shift), normed_text, rotation)
        image = image + gate[:, None] * of_image
        if self.dual_attention:
            shift2, scale2, gate2 = dual
            attend = JointAttention(self.num_heads, self.qk_norm, name="attn2")
            image = image + gate2[:, None] * attend(modulate(normed, scale2, shift2))[0]
        changed = FeedForward(name="ff")(modulate(normalise(image), scale_mlp, shift_mlp))
        image = image + gate_mlp[:, None] * changed
        if not self.text_output:
            return image, None
        text = text + text_gate[:, None] * of_text
        text_shift, text_scale, text_gate = text_mlp
        changed = FeedForward(name="ff_context")(modulate(normalise(text), text_scale, text_shift))
        return image, text + text_gate[:, None] * changed


class PatchEmbed(nn.Module):
    """Squares of pixels of (B, H, W, C) -> tokens (B, rows * columns, features) with their positions, row by row.

    Attributes:
      features: channels of a token, a multiple of 4.
      patch: side of a square in pixels.
      base, interpolation: see `position_table`.
      stored: patches along a side of the table of positions that belongs to the parameters, of which the middle is
        taken; None for positions that are computed for each size.
    """

    features: int
    patch: int
    base: int
    interpolation: float = 1.0
    stored: int | None = None

    @nn.compact
    def __call__(self, x):
        patch, features = self.patch, self.features
        rows, columns = x.shape[1] // patch, x.shape[2] // patch
        tokens = Conv(features, patch, patch, ((0, 0), (0, 0)), name="proj")(x).reshape(len(x), -1, features)
        return tokens + self._positions(rows, columns).astype(tokens.dtype)

    def _positions(self, rows, columns):
        def table(*size):
            positions = position_table(*size, self.features, self.base, self.interpolation)
            return positions.reshape(-1, self.features)

        side = self.stored
        if side is None:
            return table(rows, columns)
        if max(rows, columns) > side:
            raise ValueError(f"latents have {rows} x {columns} patches: expected at most {side} along a side")
        # Files hold it, and it need not be the sinusoids. It is not trained.
        stored = self.param("pos_embed", lambda _: table(side, side)[None])
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = jax.lax.stop_gradient(stored).reshape(side, side, self.features)
        return grid[top : top + rows, left : left + columns].reshape(-1, self.features)


def from_patches(tokens: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """Tokens (B, height/patch * width/patch, patch * patch * C), channels last -> (B, height, width, C)."""
    grid = tokens.reshape(len(tokens), height // patch, width // patch, patch, patch, -1)
    return jnp.swapaxes(grid, 2, 3).reshape(len(tokens), height, width, -1)


def check_latents(family: str, latents: jax.Array, channels: int, patch: int) -> None:
    """Raises ValueError unless `latents` is (B, h, w, channels) with sides that are multiples of `patch`."""
    if latents.ndim != 4 or latents.shape[-1] != channels:
        raise ValueError(f"latents has shape {latents.shape}: expected (B, h, w, {channels}) for {family}")
    if latents.shape[1] % patch or latents.shape[2] % patch:
        raise ValueError(f"latents has shape {latents.shape}: expected sides that are multiples of {patch}")


def position_table(rows: int, columns: int, features: int, base: int, interpolation: float = 1.0) -> jax.Array:
    """Sinusoids of a grid of patches, (rows, columns, features) float32: diffusers' `get_2d_sincos_pos_embed`.

    The first half of the features is that of the column, the second that of the row. Positions are scaled such that a
    side of `base` patches is `base / interpolation` long, whatever the side. Sinusoids are float64 before they are
    rounded; a program holds those of one row and one column.
    """
    frequencies = 1.0 / 10000 ** (np.arange(features // 4, dtype=np.float64) / (features / 4))

    def sinusoids(side):
        positions = np.arange(side, dtype=np.float32) / np.float32(side / base) / np.float32(interpolation)
        angles = np.outer(positions, frequencies)
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))

    half = (rows, columns, features // 2)
    of_columns, of_rows = (jnp.broadcast_to(part, half) for part in (sinusoids(columns), sinusoids(rows)[:, None]))
    return jnp.concatenate([of_columns, of_rows], axis=-1)
