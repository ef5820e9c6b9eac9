"""Sums over the tiles of all devices: each device keeps its own, and at the end they are added in device order.

Nothing is sent between devices or hosts until `total` is called, and then one leaf at a time, so sums cost the same
on one device and on a pod. They are compensated (core/compensated.py), so that another number of devices changes the
result by the rounding of its tiles alone.

On a mesh with the axis `model`, a leaf of the sum may be a `Shard`: then `fn` has added it up over the devices of a
group, each of which keeps its part of the group's sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.ops.shards import MODEL_AXIS, Shard, gather, is_shard, map_parameters
from attrib_jax.parallel.mesh import batch_spec, divided_axis, mark_shards, num_parts, part_specs, shard_spec


class DeviceSums:
    """Running sums of `fn(shared, batch) -> CompensatedSum` over tiles, one sum a device of `mesh`.

    `zero` makes a tree with a leading axis over devices, `add` adds one tile on each device, and `total` gives what all
    devices have summed. Every host of the mesh makes the same calls. `compiled` is the program of `add`.
    """

    def __init__(
        self,
        mesh: Mesh,
        fn: Callable[[Any, Any], CompensatedSum],
        matmul_precision: str = "highest",
        takes_shards: bool = False,
    ):
        """Compiles when first called.

        Args:
          mesh: devices that share the tiles.
          fn: `(shared, batch) -> CompensatedSum` of one tile.
          matmul_precision: precision of float32 products, see `tile_map`.
          takes_shards: whether `fn` takes divided parameters as `Shard`s, see `tile_map`.
        """
        self.mesh = mesh
        self._data = batch_spec(mesh)

        def add_tile(sums, shared, batch):
            if not takes_shards:
                shared = gather(shared)
            with jax.default_matmul_precision(matmul_precision):
                part = fn(shared, batch)
            total = CompensatedSum(*jax.tree.map(lambda leaf: leaf[0], tuple(sums))) + part
            return jax.tree.map(lambda leaf, old: leaf[None].astype(old.dtype), total, sums)

        def add(sums, shared, batch):
            own = self._specs(sums)
            specs = (own, part_specs(shared), self._data)
            return jax.shard_map(add_tile, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)(
                sums, shared, batch
            )

        if num_parts(mesh) == 1:
            specs = (self._data, PartitionSpec(), self._data)
            add = jax.shard_map(add_tile, mesh=mesh, in_specs=specs, out_specs=self._data, check_vma=False)
        self.compiled = jax.jit(add, donate_argnums=0)
        self._reduce = jax.jit(self._over_devices)

    def zero(self, like: Any) -> CompensatedSum:
        """Zeros on every device, with the layout, shapes and dtypes of the tree `like`; its `Shard`s are divided."""

        def zeros(node):
            leaf = node.value if is_shard(node) else node
            count = self.mesh.shape["data"] if is_shard(node) else self.mesh.size
            sharding = NamedSharding(self.mesh, self._specs(node))
            shape = (count, *leaf.shape)
            part = (1, *sharding.shard_shape(shape)[1:])
            array = jax.make_array_from_callback(
                shape, sharding, lambda index: np.zeros(part, leaf.dtype), dtype=leaf.dtype
            )
            return Shard(array, node.axis) if is_shard(node) else array

        return CompensatedSum(map_parameters(zeros, like), map_parameters(zeros, like))

    def _specs(self, sums: Any) -> Any:
        """The specs of sums with their leading axis over devices."""
        return map_parameters(lambda node: shard_spec(node.axis, "data") if is_shard(node) else self._data, sums)

    def add(self, sums: CompensatedSum, shared: Any, batch: Any) -> CompensatedSum:
        """Adds one tile on each device; `sums` is donated.

        `shared` is from `replicate` or `place_parameters`, `batch` from `shard_batch`.
        """
        return self.compiled(sums, shared if num_parts(self.mesh) == 1 else mark_shards(shared), batch)

    def total(self, sums: CompensatedSum) -> CompensatedSum:
        """The devices' sums added in device order; `sums` stays as it is.

        On this host's first device; on a mesh with the axis `model` on all devices, what is divided as parameters are.
        """
        # The devices of a CPU share their threads: one that waits in a collective while another has tiles to do may
        # hold the thread that these need, and XLA then aborts the process.
        jax.block_until_ready(sums)
        high, layout = jax.tree.flatten(sums.high, is_leaf=is_shard)
        low = jax.tree.leaves(sums.low, is_leaf=is_shard)
        pairs = []
        for leaves in zip(high, low):
            # Leaf by leaf: the devices hold no second copy of the whole.
            pair = self._reduce(CompensatedSum(*leaves))
            if num_parts(self.mesh) == 1:
                pair = CompensatedSum(*(part.addressable_data(0) for part in pair))
            else:
                pair = CompensatedSum(*(part.value if is_shard(part) else part for part in pair))
            pairs.append(jax.block_until_ready(pair))
        return CompensatedSum(*(jax.tree.unflatten(layout, [pair[part] for pair in pairs]) for part in range(2)))

    def _over_devices(self, pair: CompensatedSum) -> CompensatedSum:
        """One leaf's sum; of a `Shard` each device adds up its part, over the groups."""
        divided = is_shard(pair.high)
        whole = part_specs(pair)
        reduce = functools.partial(_in_device_order, self._data[0] if not divided else "data")
        mapped = jax.shard_map(reduce, mesh=self.mesh, in_specs=(self._specs(pair),), out_specs=whole, check_vma=False)
        return mapped(pair)


def _in_device_order(axis: Any, pair: CompensatedSum) -> CompensatedSum:
    """One leaf's sum over devices: each device adds up a stripe of it in order, so none holds all devices' leaves.

    Never a `psum`, whose order is the backend's.
    """
    count = jax.lax.axis_size(axis)
    shape = jax.tree.leaves(pair.high)[0].shape[1:]

    def stripes(leaf):
        flat = leaf.reshape(-1)
        flat = jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)
        return jax.lax.all_to_all(flat, axis, 0, 0, tiled=True)

    parts = jax.tree.map(stripes, pair)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    others = jax.tree.map(lambda leaf: leaf[1:], parts)
    stripe, _ = jax.lax.scan(lambda total, part: (total + part, None), first, others)
    size = int(np.prod(shape))
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True)[:size].reshape(shape), stripe)


def divided_like(mesh: Mesh, tree: Any) -> Any:
    """The tree `like` of sums of which a group of `mesh` keeps one: its leaves as `Shard`s where parameters are."""

    def mark(leaf):
        axis = divided_axis(leaf, num_parts(mesh))
        return leaf if axis is None else Shard(leaf, axis)

    return jax.tree.map(mark, tree)


def sum_over_group(tree: Any, like: Any) -> Any:
    """Adds the leaves of `tree`, whole on each device, over the devices of a group where `like` has a `Shard`.

    Each device gets its part of these, added in device order. Other leaves stay as they are.
    """

    def add(node, leaf):
        if not is_shard(node):
            return leaf
        count = jax.lax.axis_size(MODEL_AXIS)
        parts = jnp.stack(jnp.split(leaf, count, node.axis))
        parts = jax.lax.all_to_all(parts, MODEL_AXIS, 0, 0, tiled=True)
        return Shard(functools.reduce(jnp.add, [parts[place] for place in range(count)]), node.axis)

    return map_parameters(add, like, tree)
