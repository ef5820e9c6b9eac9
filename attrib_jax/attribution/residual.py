"""The residual product (docs/METHOD.md, "The residual product"): inner products of what the model leaves unexplained.

tau(z_hat, z) = k_text(c_hat, c) <r_hat, r>, where r = target - prediction at the noisier timesteps, under noise that
the query and every training image share.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.keys import example_noise, shared_noise
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import Params
from attrib_jax.diffusion.losses import Predict, predictions
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.ops.micro_batching import forward_pixels, group_size, num_pixels

# Rows whose residuals are in memory at once, as float64.
_BLOCK = 1024


def residuals(
    predict: Predict,
    schedule: NoiseSchedule,
    params: Params,
    key: jax.Array,
    batch: Batch,
    timesteps: jax.Array,
    *,
    shared: bool = True,
) -> jax.Array:
    """Residuals r = target - prediction of each of B examples -> (B, S h w c), at least float32.

    The mean of a residual's squares is the example's strided loss over these timesteps. Compile it for one B, as
    `strided_losses`, and an example's residuals do not depend on the others.

    Args:
      predict, schedule, params: the model.
      key: key of the noise: of `shared_noise` where `shared` is set, else of `example_noise`.
      batch: examples; their masks are ignored.
      timesteps: (S,) int32.
      shared: whether all examples have one noise at a timestep.
    """
    shape = batch.latents.shape[1:]
    common = shared_noise(key, timesteps, shape) if shared else None

    def residual(example):
        noise = common
        if noise is None:
            noise = example_noise(key, example.row_id, example.flip, example.caption, timesteps, shape)
        noise = noise.astype(example.latents.dtype)
        prediction, target = predictions(predict, params, schedule, example.latents, example.text, noise, timesteps)
        dtype = jnp.promote_types(jnp.result_type(prediction, target), jnp.float32)
        return (target.astype(dtype) - prediction.astype(dtype)).reshape(-1)

    count = len(batch.row_id)
    at_once = group_size(count, num_pixels(shape) * len(timesteps), forward_pixels())
    return jax.lax.map(residual, batch, batch_size=at_once % count)  # 0 is a plain vmap


def residual_products(features: Any, queries: np.ndarray) -> np.ndarray:
    """Inner products of M examples' residuals with each of Q queries' -> (Q, M, flips) float64.

    One matrix product for all queries, so the last digits depend on how many there are.

    Args:
      features: (M, flips, k), in memory or on disk, of which a block is read at a time.
      queries: (Q, k).
    """
    queries = np.asarray(queries, np.float64)
    products = np.empty((len(queries), *features.shape[:2]))
    for start in range(0, len(features), _BLOCK):
        block = np.asarray(features[start : start + _BLOCK], np.float64)
        flat = block.reshape(-1, block.shape[-1]) @ queries.T
        products[:, start : start + len(block)] = flat.T.reshape(len(queries), *block.shape[:2])
    return products


def mean_over_captions(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Means over each image's captions, (Q, M, flips) -> (Q, N, flips).

    `image` (M,) is the image of each caption, rising from 0 to N - 1 without a gap.
    """
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    counts = np.diff(np.append(starts, len(image)))
    return np.add.reduceat(values, starts, axis=1) / counts[:, None]
