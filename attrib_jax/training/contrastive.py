"""Training a small CLIP on captioned images: the symmetric contrastive loss with several right answers, and recall.

The loss is CLIP's (Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021) with
the targets of supervised contrastive learning (Khosla et al., 2020): a caption that belongs to several images of a
batch is right for each of them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.similarity import normalise
from attrib_jax.diffusion.training import random_flips
from attrib_jax.models.clip_towers import CLIPModel

_LARGEST_LOG_SCALE = math.log(100.0)  # CLIP's


class TowerBatch(NamedTuple):
    """B captioned images.

    Attributes:
      images: (B, H, W, 3) uint8.
      input_ids: (B, C, L) int32; an image with fewer than C captions repeats its first.
      caption_ids: (B, C) int32, equal where captions are the same text.
      num_captions: (B,) int32.
    """

    images: Any
    input_ids: Any
    caption_ids: Any
    num_captions: Any


def contrastive_loss(logits: jax.Array, positives: jax.Array) -> jax.Array:
    """The mean cross-entropy of images (rows) to captions (columns) and back -> ().

    Args:
      logits: (B, B) scaled similarities.
      positives: (B, B) whether a caption belongs to an image, at least one in each row and column; right answers share
        the target evenly.
    """
    positives = positives.astype(logits.dtype)

    def cross_entropy(axis: int):
        targets = positives / jnp.sum(positives, axis=axis, keepdims=True)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=axis), axis=axis))

    return 0.5 * (cross_entropy(1) + cross_entropy(0))


def random_shifts(key: jax.Array, images: jax.Array, largest: int) -> jax.Array:
    """Moves each of (B, H, W, C) by up to `largest` pixels along both axes; the edge's pixels fill what is bared."""
    padded = jnp.pad(images, ((0, 0), (largest, largest), (largest, largest), (0, 0)), mode="edge")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * largest + 1)

    def cut(image, start):
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, starts)


def tower_loss(
    model: CLIPModel, params: Any, batch: TowerBatch, key: jax.Array, largest_shift: int, mirror: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The contrastive loss of a batch, each image with one caption drawn from its own.

    Images are mirrored at random where `mirror`, and shifted by up to `largest_shift` pixels. Skin-tone variants of one
    image have captions that tell the tone, so they count as different images; a text that several share is right for
    all.
    """
    flip_key, shift_key, caption_key = jax.random.split(key, 3)
    images = random_flips(flip_key, batch.images) if mirror else batch.images
    images = random_shifts(shift_key, images, largest_shift)
    rows = jnp.arange(len(images))
    caption = jax.random.randint(caption_key, rows.shape, 0, batch.num_captions)
    pixels = images.astype(jnp.float32) / 127.5 - 1.0
    features: Any = model.apply({"params": params}, pixels, batch.input_ids[rows, caption])
    image, text = (normalise(each) for each in features)
    scale = jnp.exp(jnp.minimum(params["logit_scale"], _LARGEST_LOG_SCALE))
    logits = scale * image @ text.T
    drawn = batch.caption_ids[rows, caption]
    positives = jnp.any(batch.caption_ids[:, None, :] == drawn[None, :, None], axis=-1)
    right = jnp.take_along_axis(positives, jnp.argmax(logits, axis=1)[:, None], axis=1)
    return contrastive_loss(logits, positives), {"scale": scale, "recall_at_1": jnp.mean(right)}


def retrieval_ranks(similarity: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank of the best right answer of every query -> (Q,) int64, 1 for the first; ties count against the query.

    Args:
      similarity: (Q, A) of queries and answers.
      right: (Q, A) bool, at least one answer of each query.
    """
    best = np.max(np.where(right, similarity, -np.inf), axis=1, keepdims=True)
    return 1 + np.sum((similarity >= best) & ~right, axis=1)
