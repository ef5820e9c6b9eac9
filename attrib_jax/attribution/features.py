"""Features of images and texts in a tower, AbC's mapping of them, and their cosine similarities."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from attrib_jax.attribution.feature_head import FeatureHead
from attrib_jax.convert.tokenizer import tokenize_prompts
from attrib_jax.convert.tower import Tower
from attrib_jax.parallel.mesh import padded_tiles

# Images, and texts, in a compiled call. Fixed, so that a feature does not depend on how many are asked for.
IMAGE_TILE = 16
TEXT_TILE = 64
_BLOCK = 4096


def image_features(tower: Tower, images: Any) -> np.ndarray:
    """Features of images -> (B, d) float32, on the host; an image's do not depend on the others.

    Args:
      tower: see `load_tower`.
      images: (B, H, W, 3) floats in [-1, 1], rounded to 8 bits as an image file would be and then resized, cropped and
        normalised as the tower's image processor does.

    Raises ValueError for another shape, no image, values outside of [-1, 1] or a tower without images.
    """
    images = np.asarray(images)
    if images.ndim != 4 or len(images) == 0 or images.shape[-1] != 3 or not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images has shape {images.shape} {images.dtype}; expected (B > 0, H, W, 3) floats in [-1, 1]")
    if not np.all(np.abs(images) <= 1):
        raise ValueError(f"images has values from {images.min()} to {images.max()}; expected [-1, 1]")
    return pixel_features(tower, np.round((images + 1) * 127.5).astype(np.uint8))


def pixel_features(tower: Tower, images: np.ndarray) -> np.ndarray:
    """As `image_features`, of images (B, H, W, 3) uint8."""
    if tower.processor is None:
        raise ValueError("this CLIP tower has a text half alone; load one with a vision tower")
    fitted = np.stack([tower.processor.fit(image) for image in images])
    return _in_tiles(functools.partial(_images, tower.module, tower.processor), tower.params, fitted, IMAGE_TILE)


def text_features(tower: Tower, texts: Sequence[str]) -> np.ndarray:
    """Features of texts in a CLIP tower -> (B, d) float32, on the host.

    Raises ValueError for another tower or no text, TypeError for one bare string.
    """
    if tower.tokenizer is None:
        raise ValueError(f"a {tower.family} tower without a text half reads no texts; load a CLIP with both halves")
    if len(texts) == 0:
        raise ValueError("texts is empty; expected one or more")
    ids = tokenize_prompts(tower.tokenizer, texts)
    return _in_tiles(functools.partial(_texts, tower.module), tower.params, ids, TEXT_TILE)


def encode_images(module: Any, processor: Any, params: Any, fitted: jax.Array) -> jax.Array:
    """Fitted images (B, side, side, 3) uint8 -> features (B, d)."""
    return module.apply({"params": params}, processor.normalise(fitted), method="image_features")


def encode_texts(module: Any, params: Any, input_ids: jax.Array) -> jax.Array:
    """Tokens (B, L) -> features (B, d)."""
    return module.apply({"params": params}, input_ids, method="text_features")


_images = jax.jit(encode_images, static_argnums=(0, 1))
_texts = jax.jit(encode_texts, static_argnums=0)


def _in_tiles(function: Any, params: Any, rows: np.ndarray, tile: int) -> np.ndarray:
    tiles, _ = padded_tiles(len(rows), tile)
    with jax.default_matmul_precision("highest"):
        results = [function(params, rows[members]) for members in tiles]
    return np.concatenate([np.asarray(result) for result in results])[: len(rows)]


def normalise_rows(features: np.ndarray) -> np.ndarray:
    """Features (..., d) at unit length, float64; a zero vector stays zero."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def cosine_similarities(features: Any, queries: np.ndarray, head: FeatureHead | None = None) -> list[np.ndarray]:
    """Cosine similarities of N images' features with each of J queries' -> J arrays (N, views) float64.

    Args:
      features: (N, views, d), in memory or on disk, of which a block is read at a time.
      queries: (J, d).
      head: maps features and queries first, each by its own mapping; None compares them as they are.
    """
    queries = normalise_rows(queries if head is None else head.query(queries))
    results = [np.empty(features.shape[:2]) for _ in queries]
    for start in range(0, len(features), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = np.asarray(features[rows])
        block = normalise_rows(block if head is None else head.training(block))
        for result, query in zip(results, queries):
            # Not a product of matrices, whose last digits would depend on the number of queries and rows.
            result[rows] = np.einsum("nvd,d->nv", block, query)
    return results
