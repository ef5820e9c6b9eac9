"""Which part of a query counts: a box of its picture, or the marked pixels of a mask."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from attrib_jax.attribution.regions import region_mask, shape_mask
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods.config import AttributeConfig


def query_mask(query: PreparedQuery, config: AttributeConfig) -> np.ndarray | None:
    """The weights (h, w) of the query's latent pixels; None where all count.

    Raises ValueError where the region does not fit the query's picture, or its mask is no PNG or empty;
    FileNotFoundError where the mask's file does not exist.
    """
    size, latent_size = query.image.shape[:2], query.latents.shape[:2]
    if config.region is not None:
        return region_mask(config.region, size, latent_size)
    if config.region_mask is not None:
        return shape_mask(read_region_mask(config.region_mask, size), latent_size)
    return None


def read_region_mask(path: str | os.PathLike, image_size: tuple[int, int]) -> np.ndarray:
    """Reads a mask for a picture of (H, W) pixels -> (H, W) bool.

    Pixels count where any colour channel is not 0; transparent ones do not.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no PNG file, or of another size; no pixel counts.
    """
    name, (height, width) = os.fspath(path), image_size
    if not Path(path).is_file():
        raise FileNotFoundError(f"region_mask {name!r} does not exist")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            # Before the pixels are decoded, so that none are that could not be used.
            if picture.size != (width, height):
                raise ValueError(
                    f"region_mask {name!r} has {picture.width} x {picture.height} pixels; expected {width} x {height}, "
                    "as many as the query's picture"
                )
            if picture.has_transparency_data:
                *colours, opaque = picture.convert("RGBA").split()
                marked = np.any(colours, axis=0) & (np.asarray(opaque) > 0)
            else:
                # Palettes hold colours; 1-bit and 16-bit greys are taken as they are.
                pixels = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
                marked = pixels.reshape(height, width, -1).any(axis=-1)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"region_mask {name!r} cannot be read as a PNG file ({error})") from error
    if not marked.any():
        raise ValueError(f"region_mask {name!r} marks no pixel; paint what counts in any colour but black")
    return marked
