"""Similarities of latents and of captions, without a model.

Latents: the baselines that know the data set alone (METHOD.md section 7). Captions: kernels k_text(c_hat, c), how far
a step on one caption moves the model at another (docs/METHOD.md, "The residual product").
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Images whose latents are in memory at once, as float64.
_BLOCK = 1024
# Captions whose text states are, likewise.
_CAPTIONS = 256
# Vectors among which distances are taken for their median.
_SAMPLE = 1024
TEXT_KERNELS = ("gaussian", "same", "tokens", "none")


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


def normalise_caption(caption: str) -> str:
    """A caption without what does not change its meaning: case, white space, compatibility forms of characters."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", caption).casefold()).strip()


def same_caption(query: str, captions: Sequence[str]) -> np.ndarray:
    """1 for each of M captions that is the query's after `normalise_caption`, else 0 -> (M,) float64."""
    wanted = normalise_caption(query)
    return np.array([normalise_caption(caption) == wanted for caption in captions], np.float64)


class TextStatistics(NamedTuple):
    """What text kernels need of the text states of M captions.

    Attributes:
      pooled: (M, d) float32, the mean over the tokens of each caption.
      distance: () float64, the median distance of the pooled states of two different captions; 0 if there are none.
      moment: (d, d) float64, the uncentred second moment E[c c^T] over tokens and captions, EKFAC's input factor.
    """

    pooled: np.ndarray
    distance: np.ndarray
    moment: np.ndarray


def text_statistics(text: Any, rows: np.ndarray) -> TextStatistics:
    """Statistics of the text states `text[rows]`, text (R, L, d) in memory or on disk, rows (M,)."""
    width = text.shape[-1]
    pooled, moment = np.empty((len(rows), width), np.float32), np.zeros((width, width))
    for start in range(0, len(rows), _CAPTIONS):
        states = np.asarray(text[rows[start : start + _CAPTIONS]], np.float64)
        pooled[start : start + len(states)] = states.mean(axis=1)
        tokens = states.reshape(-1, width)
        moment += tokens.T @ tokens
    moment /= len(rows) * text.shape[1]
    return TextStatistics(pooled, np.asarray(median_distance(pooled)), moment)


def gaussian_kernel(query: np.ndarray, statistics: TextStatistics, width: float) -> np.ndarray:
    """exp(-d^2 / (2 s^2)) for the distance d of pooled text states, s = `width` x the median distance -> (M,) float64.

    Where all captions are one, it is 1. `query` (L, d) are the query's text states.
    """
    if not statistics.distance > 0:
        return np.ones(len(statistics.pooled))
    difference = statistics.pooled.astype(np.float64) - np.asarray(query, np.float64).mean(axis=0)
    return np.exp(-np.square(difference).sum(axis=1) / (2 * (width * float(statistics.distance)) ** 2))


def token_kernels(
    queries: Sequence[np.ndarray], text: Any, rows: np.ndarray, statistics: TextStatistics, damping: float
) -> np.ndarray:
    """Cosines of captions in the metric of the text states' second moment A -> (Q, M) float64.

    k(c_hat, c) = sum_l c_hat_l^T (A + lambda I)^-1 c_l over the tokens l, divided by sqrt(k(c_hat, c_hat) k(c, c)).

    Args:
      queries: Q text states (L, d).
      text, rows: as in `text_statistics`.
      statistics: of the same captions.
      damping: lambda as a share of A's mean eigenvalue, above 0.

    Raises ValueError where the queries have other numbers of tokens than the captions.
    """
    expected = tuple(text.shape[1:])
    for query in queries:
        if np.shape(query) != expected:
            raise ValueError(
                f"the query's text states have shape {np.shape(query)} and those of the data set {expected}: "
                "text_kernel='tokens' compares them token by token and expected one shape. Change text_kernel."
            )
    width = len(statistics.moment)
    ridge = damping * np.trace(statistics.moment) / width
    root = np.linalg.cholesky(statistics.moment + ridge * np.eye(width))

    def whiten(states: np.ndarray) -> np.ndarray:
        """(B, L, d) -> unit vectors (B, L d) whose products are the kernel."""
        flat = np.linalg.solve(root, states.reshape(-1, width).T).T.reshape(len(states), -1)
        length = np.linalg.norm(flat, axis=1, keepdims=True)
        return flat / np.where(length > 0, length, 1)

    directions = whiten(np.stack(queries).astype(np.float64))
    kernel = np.empty((len(queries), len(rows)))
    for start in range(0, len(rows), _CAPTIONS):
        states = np.asarray(text[rows[start : start + _CAPTIONS]], np.float64)
        kernel[:, start : start + len(states)] = directions @ whiten(states).T
    return kernel
