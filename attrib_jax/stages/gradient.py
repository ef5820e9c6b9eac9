"""The query's gradient on all devices: the draws of `query_gradient`, one tile a device at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.unlearn import DRAWS_PER_TILE, QueryGradient, tile_gradient
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.runtime.mesh import data_mesh, replicate, shard_batch, tile_map


class GradientProgram:
    """The compiled gradient of any query's loss, made once for a model; `bind` makes the `sum_draws` of `unlearn`.

    Tiles are added in the order of their draws: another number of devices changes only the rounding within a tile.
    """

    def __init__(self, predict: Predict, schedule: NoiseSchedule, mesh: Mesh | None = None):
        self.mesh, self.predict = mesh or data_mesh(), predict
        self._schedule = replicate(self.mesh, schedule)
        self._run = tile_map(self.mesh, functools.partial(_tile_gradient, predict))
        self._add = jax.jit(functools.partial(_add_in_order, count=self.mesh.size))

    def bind(
        self, rest: Any, latents: np.ndarray, text: np.ndarray, draws: int, mask: np.ndarray | None = None
    ) -> Callable[[Any, jax.Array, Callable[[int], None]], QueryGradient]:
        """`(selected, key, advance) -> sums over the draws` for one query: arguments as in `query_gradient`."""
        fixed = replicate(self.mesh, (rest, self._schedule, jnp.asarray(latents), jnp.asarray(text), mask))
        tiles = np.arange(-(-draws // (DRAWS_PER_TILE * self.mesh.size)) * self.mesh.size, dtype=np.int32)

        def sum_draws(selected, key, advance):
            shared = (fixed, replicate(self.mesh, (selected, key, np.int32(draws))))
            home = self.mesh.local_devices[0]
            dtype = jnp.result_type(*jax.tree.leaves(selected), jnp.float32)
            total = QueryGradient(jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, selected))
            total = jax.device_put(total, home)
            for first in range(0, len(tiles), self.mesh.size):
                parts = self._run(shared, shard_batch(self.mesh, tiles[first : first + self.mesh.size]))
                total = self._add(total, jax.device_put(parts, home))
                jax.block_until_ready(total.loss)
                advance(min((first + self.mesh.size) * DRAWS_PER_TILE, draws))
            return total

        return sum_draws


def _tile_gradient(predict: Predict, shared: Any, tile: jax.Array) -> QueryGradient:
    """The sums of tile number `tile` (1,), each leaf with a leading axis of one; draws beyond the last count zero."""
    (rest, schedule, latents, text, mask), (selected, key, draws) = shared
    indices = tile[0] * DRAWS_PER_TILE + jnp.arange(DRAWS_PER_TILE, dtype=jnp.int32)
    sums = tile_gradient(predict, schedule, selected, rest, latents, text, key, mask, indices, draws)
    return jax.tree.map(lambda leaf: leaf[None], sums)


def _add_in_order(total: QueryGradient, parts: QueryGradient, count: int) -> QueryGradient:
    for index in range(count):
        total = jax.tree.map(lambda old, new, index=index: old + new[index], total, parts)
    return total
