"""Patch attribution (docs/METHOD.md, "Patches"): the optimal denoiser of the training set, seen patch by patch.

The optimal denoiser of a finite training set answers a noisy image by the mean of the training images, weighted by
softmax_i(-|x - y_i|^2 / (2 sigma^2)), sigma^2 = (1 - abar_t) / abar_t. Taken for each patch of the query against the
patches of every training image, the weights say which region owes what to whom, without any model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.similarity import sampled
from attrib_jax.ops.matmul_precision import full_precision_matmuls

# Images among which distances are taken for their median.
_SAMPLE = 256


class Grid(NamedTuple):
    """The patches of one size, at distances of half a patch and up to the far edges; a pytree.

    Attributes:
      rows: (P, h) float32, 1 where a row of pixels is in the row of patches, else 0.
      columns: (Q, w) float32, the same across.
    """

    rows: Any
    columns: Any

    @property
    def num_patches(self) -> int:
        """Patches of one image, P Q."""
        return len(self.rows) * len(self.columns)


def make_grids(shape: Sequence[int], shares: Sequence[float]) -> list[Grid]:
    """A grid for each size of patches, largest first; shares that come to the same number of pixels are one size.

    Args:
      shape: (h, w, ...) of the latents.
      shares: sides of the patches as shares of the latents' sides, above 0 and at most 1; at least a pixel.
    """
    height, width = shape[:2]
    sizes = {tuple(max(1, round(share * side)) for side in (height, width)) for share in shares}
    return [Grid(_bands(height, size[0]), _bands(width, size[1])) for size in sorted(sizes, reverse=True)]


def _bands(side: int, size: int) -> np.ndarray:
    starts = sorted({*range(0, side - size + 1, max(1, size // 2)), side - size})
    pixels = np.arange(side)
    return np.stack([(start <= pixels) & (pixels < start + size) for start in starts]).astype(np.float32)


def make_offsets(shape: Sequence[int], reach: float) -> np.ndarray:
    """Places of a training patch beside that of the query's, (0, 0) among them -> (O, 2) int32, down and across.

    `reach` is the largest distance, along each side, as a share of that side.
    """
    reaches = [min(round(reach * side), side - 1) for side in shape[:2]]
    down, across = (np.arange(-most, most + 1, dtype=np.int32) for most in reaches)
    return np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2)


def patch_evidence(
    query: jax.Array, images: jax.Array, grids: Sequence[Grid], sigmas: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Logarithms of what each training image weighs at every patch of the query -> (B, M), before normalisation.

    log sum_o exp(-d_o^2 / (2 sigma^2)), d_o the distance of the query's patch from the image's at offset o from it, the
    sum over the offsets at which that patch lies in the image. M counts sizes, noise levels and patches: those of one
    size follow each other, and of one noise level among them.

    Args:
      query: (h, w, c).
      images: (B, h, w, c).
      grids: G of them, from `make_grids`.
      sigmas: (G, W) the noise levels of each size, above 0.
      offsets: (O, 2), from `make_offsets`.
    """
    height, width = query.shape[:2]

    def add_offset(total, offset):
        moved = jnp.roll(images, -offset, axis=(1, 2))
        squares = jnp.sum(jnp.square(moved - query), axis=-1)
        # What was rolled over an edge belongs to no patch.
        inside = [(i + o >= 0) & (i + o < side) for i, o, side in zip(_pixels(height, width), offset, (height, width))]
        parts = []
        for grid, levels in zip(grids, sigmas):
            valid = [~((axis > 0) & ~ok).any(axis=1) for axis, ok in zip(grid, inside)]
            exponents = -_box_sums(squares, grid)[:, None] / (2 * jnp.square(levels)[:, None, None])
            exponents = jnp.where(valid[0][:, None] & valid[1], exponents, -jnp.inf)
            parts.append(exponents.reshape(len(images), -1))
        return jnp.logaddexp(total, jnp.concatenate(parts, axis=1)), None

    count = sum(grid.num_patches for grid in grids) * sigmas.shape[1]
    with full_precision_matmuls():
        return jax.lax.scan(add_offset, jnp.full((len(images), count), -jnp.inf, images.dtype), offsets)[0]


def _pixels(*sides: int) -> list[jax.Array]:
    return [jnp.arange(side) for side in sides]


def _box_sums(values: jax.Array, grid: Grid) -> jax.Array:
    """Sums of (..., h, w) over each patch -> (..., P, Q)."""
    return jnp.einsum("ph,...hw,qw->...pq", grid.rows, values, grid.columns)


class Readout(NamedTuple):
    """How weights (B, M) at all patches become scores: `weights @ matrix` is (B, 1 + R).

    Attributes:
      matrix: (M, 1 + R) float32. Column 0 is the mean over sizes, noise levels and patches; the others are the mean
        over noise levels at each of R regions, patches of the smallest size that lie side by side.
      boxes: (R, 4) float64, x0, y0, x1, y1 of the regions, as shares of the image's sides.
    """

    matrix: np.ndarray
    boxes: np.ndarray


def make_readout(grids: Sequence[Grid], levels: int) -> Readout:
    """The readout of `patch_evidence` at `levels` noise levels."""
    mean = [np.full(levels * grid.num_patches, 1 / (len(grids) * levels * grid.num_patches)) for grid in grids]
    finest = grids[-1]
    down, across = (_tiles(np.asarray(axis)) for axis in finest)
    places = [(row, column) for row, _ in down for column, _ in across]
    regions = np.zeros((sum(map(len, mean)), len(places)))
    own = regions[len(regions) - levels * finest.num_patches :].reshape(
        levels, len(finest.rows), len(finest.columns), -1
    )
    for number, (row, column) in enumerate(places):
        own[:, row, column, number] = 1 / levels
    boxes = [(left, top, right, bottom) for _, (top, bottom) in down for _, (left, right) in across]
    return Readout(np.column_stack([np.concatenate(mean), regions]).astype(np.float32), np.array(boxes, np.float64))


def _tiles(bands: np.ndarray) -> list[tuple[int, tuple[float, float]]]:
    """Patches along an axis that cover it side by side, the last one up to the edge -> (number, (from, to))."""
    side = bands.shape[1]
    spans = [(int(band.argmax()), int(side - band[::-1].argmax())) for band in bands]
    chosen, end = [], 0
    for number, (start, stop) in enumerate(spans):
        following = spans[number + 1][0] if number + 1 < len(spans) else side + 1
        if stop > end and (start == end or following > end):
            chosen.append((number, (start / side, stop / side)))
            end = stop
    return chosen


def median_patch_distances(latents: Any, rows: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """The median distance of two training images' patches of each size, at one place -> (G,) float64.

    Of at most 256 images that do not depend on anything but their number. Pairs at distance 0 do not count; 1 where
    there is no other pair.

    Args:
      latents: (R, 2, h, w, c), in memory or on disk, [:, 1] of the mirror images.
      rows: (N,) which of them.
      grids: from `make_grids`.
    """
    chosen = sampled(len(rows))
    chosen = chosen[:: -(-len(chosen) // _SAMPLE)]
    images = np.asarray(latents[rows[chosen]])[:, 0].astype(np.float32)
    upper, medians = np.triu_indices(len(images), 1), []
    for grid in grids:
        distances = np.asarray(_distances(images, grid))[upper]
        distances = distances[distances > 0]
        medians.append(float(np.median(distances)) if len(distances) else 1.0)
    return np.array(medians)


@jax.jit
def _distances(images, grid):
    """(n, n, P, Q), of all pairs."""

    def from_one(image):
        return jnp.sqrt(_box_sums(jnp.sum(jnp.square(images - image), axis=-1), grid))

    with full_precision_matmuls():
        return jax.lax.map(from_one, images)


class RegionMap(NamedTuple):
    """Which region of the query owes what to whom.

    Attributes:
      boxes: (R, 4) float64, x0, y0, x1, y1 of the regions, as shares of the image's sides.
      row_id: (R, k) int32, the images with the largest weights, best first.
      flip: (R, k) int32, 1 for the mirror image.
      weight: (R, k) float64, their weights; those of all images and mirror images that are scored add up to 1.
    """

    boxes: np.ndarray
    row_id: np.ndarray
    flip: np.ndarray
    weight: np.ndarray


def region_map(boxes: np.ndarray, weights: np.ndarray, row_ids: np.ndarray, top: int) -> RegionMap:
    """The `top` images of every region; of an image and its mirror image the one that weighs more.

    Args:
      boxes: (R, 4), as `Readout` has them.
      weights: (N, flips, R).
      row_ids: (N,) rising or not; equal weights go by row id.
    """
    flip = weights.argmax(axis=1)
    best = np.take_along_axis(weights, flip[:, None], axis=1)[:, 0]
    order = np.stack([np.lexsort((row_ids, -each))[:top] for each in best.T])
    regions = np.arange(len(boxes))[:, None]
    return RegionMap(
        boxes, row_ids[order].astype(np.int32), flip[order, regions].astype(np.int32), best[order, regions]
    )
