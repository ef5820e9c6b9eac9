"""The query's gradient on all devices: the draws of `query_gradient`, one tile a device at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attrib_jax.attribution.unlearn import DRAWS_PER_TILE, QueryGradient, by_selected, tile_gradient, zero_gradient
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import as_predictor
from attrib_jax.ops import prepare_kernels
from attrib_jax.parallel.mesh import (
    constrain_parameters,
    data_mesh,
    host_share,
    mesh_platform,
    num_parts,
    place_parameters,
    replicate,
    shard_batch,
)
from attrib_jax.parallel.sums import DeviceSums, divided_like


class GradientProgram:
    """The compiled gradient of any query's loss, made once for a model; `bind` makes the `sum_draws` of `unlearn`.

    Devices keep compensated sums of their tiles, which are added in device order: another number of devices changes
    only the rounding within a tile. With several hosts all make the same calls, and all get the sums. On a mesh with
    the axis `model` weights and gradient are divided; the gradient's sum within a group has the backend's order.
    """

    def __init__(self, predict: Predict, schedule: NoiseSchedule, mesh: Mesh | None = None):
        self.mesh, self.predict = mesh or data_mesh(), predict
        self._schedule = replicate(self.mesh, schedule)
        self._sums = gradient_sums(predict, self.mesh)
        self._project, self._by_selected = _projections(predict, self.mesh)

    def bind(
        self, rest: Any, latents: np.ndarray, text: Any, draws: int, mask: np.ndarray | None = None
    ) -> Callable[[Any, jax.Array, Callable[[int], None]], QueryGradient]:
        """`(selected, key, advance) -> sums over the draws` for one query: arguments as in `query_gradient`."""
        count, fixed = self.mesh.size, None
        tiles = np.arange(-(-draws // (DRAWS_PER_TILE * count)) * count, dtype=np.int32).reshape(-1, count)
        share = host_share(self.mesh, count)
        text = jax.tree.map(jnp.asarray, text)

        def sum_draws(selected, key, advance):
            nonlocal fixed
            if fixed is None:
                prepared = prepare_kernels(rest, mesh_platform(self.mesh))
                others = replicate(self.mesh, (self._schedule, jnp.asarray(latents), text, mask))
                fixed = (place_parameters(self.mesh, prepared), *others)
            if num_parts(self.mesh) > 1:
                selected = place_parameters(self.mesh, selected)
            weights = self._project(selected, text)
            like = jax.eval_shape(zero_gradient, weights)
            if num_parts(self.mesh) > 1:
                divided = like.gradient._replace(others=divided_like(self.mesh, like.gradient.others))
                like, shared = like._replace(gradient=divided), (weights, *replicate(self.mesh, (key, np.int32(draws))))
            else:
                shared = replicate(self.mesh, (weights, key, np.int32(draws)))
            shared = (fixed, shared)
            sums = self._sums.zero(like)
            for number, row in enumerate(tiles, start=1):
                sums = self._sums.add(sums, shared, shard_batch(self.mesh, row[share]))
                jax.block_until_ready(sums.high.loss)
                advance(min(number * count * DRAWS_PER_TILE, draws))
            return self._by_selected(self._sums.total(sums).value(), selected, text)

        return sum_draws


@functools.lru_cache(maxsize=4)
def gradient_sums(predict: Predict, mesh: Mesh) -> DeviceSums:
    """The compiled sum over tiles of draws, made once: another model of the same architecture compiles nothing."""
    return DeviceSums(mesh, functools.partial(_tile_gradient, predict, mesh_platform(mesh)), takes_shards=True)


@functools.lru_cache(maxsize=4)
def _projections(predict: Predict, mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    project = as_predictor(predict).project_text
    if num_parts(mesh) == 1:
        return _exactly(project), _exactly(by_selected)
    whole = NamedSharding(mesh, PartitionSpec())

    def divided_project(selected, text):
        weights = project(selected, text)
        projections = jax.lax.with_sharding_constraint(weights.projections, whole)
        return weights._replace(others=constrain_parameters(mesh, weights.others), projections=projections)

    def divided_by_selected(total, selected, text):
        found = by_selected(total, selected, text)
        return found._replace(gradient=constrain_parameters(mesh, found.gradient))

    return _exactly(divided_project), _exactly(divided_by_selected)


def _exactly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` compiled, with products of float32 numbers as those of `DeviceSums`."""
    return jax.jit(jax.default_matmul_precision("highest")(fn))


def _tile_gradient(predict: Predict, platform: str, shared: Any, tile: jax.Array) -> CompensatedSum:
    """The sums of tile number `tile` (1,); draws beyond the last count zero."""
    (rest, schedule, latents, text, mask), (weights, key, draws) = shared
    indices = tile[0] * DRAWS_PER_TILE + jnp.arange(DRAWS_PER_TILE, dtype=jnp.int32)
    query = (weights, rest, latents, text, key, mask)
    sums = tile_gradient(predict, schedule, *query, indices, draws, platform)
    return CompensatedSum.of(sums)
