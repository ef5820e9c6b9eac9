"""Weights of a small UNet that keep its activations near one, without compiling its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.weights import flatten_names, unflatten_names


def random_params(unet, size: int, text_shape: tuple[int, int], dtype=np.float32):
    """Parameters of `unet` for latents of `size` pixels a side and texts of (length, width)."""
    rng = np.random.default_rng(0)
    latents = jnp.zeros((1, size, size, unet.config.in_channels))
    layout = jax.eval_shape(unet.init, jax.random.key(0), latents, 0, jnp.zeros((1, *text_shape)))["params"]
    drawn = {}
    for name, leaf in flatten_names(layout).items():
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.2
        drawn[name] = (scale * rng.normal(size=leaf.shape) + name.endswith("scale")).astype(dtype)
    return unflatten_names(drawn)
