"""Similarities of latents: the baselines that know the data set and no model (METHOD.md section 7)."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Images whose latents are in memory at once, as float64.
_BLOCK = 1024
# Vectors among which distances are taken for their median.
_SAMPLE = 1024


def median_distance(vectors: Any) -> float:
    """The median Euclidean distance of two different vectors of N, of at most 1,024 of them taken at random.

    Pairs at distance 0 do not count; 0 where there is no other pair. `vectors` is (N, ...), in memory.
    """
    sample = np.asarray(vectors)[sampled(len(vectors))].astype(np.float64)
    sample = sample.reshape(len(sample), -1)
    pairs = [np.linalg.norm(sample[place + 1 :] - vector, axis=1) for place, vector in enumerate(sample)]
    distances = np.concatenate([np.zeros(0), *pairs])
    distances = distances[distances > 0]
    return float(np.median(distances)) if len(distances) else 0.0


def sampled(count: int) -> np.ndarray:
    """The vectors, of `count`, that `median_distance` looks at -> rising positions, a function of `count` alone."""
    if count <= _SAMPLE:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(key=[0, 0xD157]))
    return np.sort(generator.choice(count, _SAMPLE, replace=False))


def gaussian_similarities(latents: Any, rows: np.ndarray, flips: int, query: np.ndarray, width: float) -> np.ndarray:
    """exp(-|x_hat - x|^2 / (2 width^2)) of N images -> (N, flips) float64; at width 0, 1 where they are equal, else 0.

    Args:
      latents: (R, 2, h, w, c), in memory or on disk, [:, 1] of the mirror images.
      rows: (N,) which of them.
      flips: 1 for the images as they are, 2 with their mirror images.
      query: (h, w, c).
      width: standard deviation of the kernel, in the latents' units.
    """
    query = np.asarray(query, np.float64).reshape(-1)
    squared = np.empty((len(rows), flips))
    for span, block in _blocks(latents, rows, flips):
        squared[span] = np.square(block - query).sum(axis=-1)
    return np.exp(-squared / (2 * width**2)) if width > 0 else (squared == 0).astype(np.float64)


def centred_products(latents: Any, rows: np.ndarray, flips: int, query: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(x_hat - m) . (x - m) of the members among N images, m the members' mean over their flips -> (N, flips) float64.

    The others score 0: without a model nothing is known of them.

    Args:
      latents, rows, flips, query: as in `gaussian_similarities`.
      members: (N,) bool, the images to compare with, at least one.
    """
    query = np.asarray(query, np.float64).reshape(-1)
    inside, total = rows[members], np.zeros_like(query)
    for _, block in _blocks(latents, inside, flips):
        total += block.sum(axis=(0, 1))
    mean = total / (len(inside) * flips)
    products = np.empty((len(inside), flips))
    for span, block in _blocks(latents, inside, flips):
        products[span] = (block - mean) @ (query - mean)
    scores = np.zeros((len(rows), flips))
    scores[members] = products
    return scores


def _blocks(latents: Any, rows: np.ndarray, flips: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Latents of `rows` as (B, flips, h w c) float64, with their places among `rows`."""
    for start in range(0, len(rows), _BLOCK):
        block = np.asarray(latents[rows[start : start + _BLOCK]], np.float64)[:, :flips]
        yield slice(start, start + len(block)), block.reshape(len(block), flips, -1)


def normalise(features: jax.Array) -> jax.Array:
    """Features (..., d) at unit length; a zero vector stays zero."""
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(length, jnp.finfo(features.dtype).tiny)
