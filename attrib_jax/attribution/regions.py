"""Region attribution (METHOD.md section 5): a box or a mask of the query's image as weights of its latents."""

from collections.abc import Sequence

import numpy as np


def region_mask(region: Sequence[float], image_size: tuple[int, int], latent_size: tuple[int, int]) -> np.ndarray:
    """The share of each latent pixel that a box of the image covers -> (h, w) float32 in [0, 1].

    A latent pixel that the box cuts counts by its covered share, so the query's loss follows the box smoothly, a box of
    a few image pixels still selects something, and the mask's sum is the box's area in latent pixels.

    Args:
        region: (x0, y0, x1, y1) in image pixels from the top left, x to the right; x1 and y1 are exclusive.
        image_size: (H, W) of the image.
        latent_size: (h, w) of its latents.

    Raises:
        ValueError: not four finite numbers, an empty box, or one that reaches outside the image.
    """
    height, width = image_size
    box = [float(edge) for edge in region]
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"region is {tuple(region)}: expected four numbers x0,y0,x1,y1 in image pixels")
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"region is {tuple(region)}: expected x0 < x1 and y0 < y1, x0,y0 being the top left")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"region is {tuple(region)}: expected a box inside the image of {width} x {height} pixels")
    rows = _coverage(y0 * latent_size[0] / height, y1 * latent_size[0] / height, latent_size[0])
    columns = _coverage(x0 * latent_size[1] / width, x1 * latent_size[1] / width, latent_size[1])
    return np.outer(rows, columns).astype(np.float32)


def shape_mask(shape: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
    """The share of each latent pixel that a shape in the image covers -> (h, w) float32 in [0, 1].

    As `region_mask` does for a box: a latent pixel that the shape covers in part counts by its share.

    Args:
        shape: (H, W) bool, the image pixels that count.
        latent_size: (h, w) of the image's latents.

    Raises:
        ValueError: no pixel counts.
    """
    shape = np.asarray(shape, bool)
    if not shape.any():
        raise ValueError(
            f"region_mask of {shape.shape[1]} x {shape.shape[0]} pixels is empty: expected at least one marked pixel"
        )
    rows, columns = (_shares(size, latent) for size, latent in zip(shape.shape, latent_size))
    return (rows @ shape @ columns.T).astype(np.float32)


def _shares(size: int, latent: int) -> np.ndarray:
    """(latent, size): the share of each latent pixel that each of `size` image pixels covers along one axis."""
    edges = np.arange(size + 1) * latent / size
    return np.stack([_coverage(start, stop, latent) for start, stop in zip(edges, edges[1:])], axis=1)


def _coverage(start: float, stop: float, size: int) -> np.ndarray:
    """Length of [start, stop] within each of the unit cells [i, i + 1], i < size."""
    cells = np.arange(size)
    return np.clip(np.minimum(stop, cells + 1) - np.maximum(start, cells), 0, 1)
