"""How alike images look to a feature tower, given as the latents that a model drew (METHOD.md section 8)."""

from typing import Any

import numpy as np

from attrib_jax.attribution.features import IMAGE_TILE, normalise_rows, pixel_features
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.tower import Tower
from attrib_jax.jobs.query import decode
from attrib_jax.parallel.mesh import padded_tiles


def image_directions(pipeline: Pipeline, tower: Tower, latents: Any) -> np.ndarray:
    """Unit vectors of the decoded images' features; the product of two is the images' cosine similarity.

    Images are decoded and read in tiles of one shape, so that an image's features do not depend on the others: equal
    latents have similarity 1.

    Args:
      pipeline: whose autoencoder decodes.
      tower: with a vision half, see `load_tower`; images are resized, cropped and normalised as it wants them.
      latents: (B, h, w, c), B at least 1, multiplied by the scaling factor.

    Returns:
      (B, d) float64.

    Raises ValueError for a tower without a vision half, see `check_sees_images`.
    """
    check_sees_images(tower)
    latents = np.asarray(latents, np.float32)
    tiles, _ = padded_tiles(len(latents), IMAGE_TILE)
    features = [pixel_features(tower, decode(pipeline, latents[members])) for members in tiles]
    return normalise_rows(np.concatenate(features)[: len(latents)])


def check_sees_images(tower: Tower) -> None:
    """Raises ValueError for a CLIP text tower alone."""
    if tower.processor is None:
        raise ValueError(
            f"tower is a {tower.family} text half alone; expected one that sees images, such as "
            "models/openmoji_tower or openai/clip-vit-base-patch32"
        )
