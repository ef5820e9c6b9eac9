"""Which part of a query counts: a box of its picture."""

import numpy as np

from attrib_jax.attribution.regions import region_mask
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.query import PreparedQuery


def query_mask(query: PreparedQuery, config: AttributeConfig) -> np.ndarray | None:
    """The weights (h, w) of the query's latent pixels; None where all count.

    Raises ValueError where the region does not fit the query's picture.
    """
    if config.region is None:
        return None
    return region_mask(config.region, query.image.shape[:2], query.latents.shape[:2])
