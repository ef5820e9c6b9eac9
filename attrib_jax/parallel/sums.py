"""Sums over the tiles of all devices: each device keeps its own, and at the end they are added in device order.

Nothing is sent between devices or hosts until `total` is called, and then one leaf at a time, so sums cost the same
on one device and on a pod. They are compensated (core/compensated.py), so that another number of devices changes the
result by the rounding of its tiles alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attrib_jax.core.compensated import CompensatedSum

_DATA = PartitionSpec("data")


class DeviceSums:
    """Running sums of `fn(shared, batch) -> CompensatedSum` over tiles, one sum a device of `mesh`.

    `zero` makes a tree with a leading axis over devices, `add` adds one tile on each device, and `total` gives what all
    devices have summed. Every host of the mesh makes the same calls. `compiled` is the program of `add`.
    """

    def __init__(self, mesh: Mesh, fn: Callable[[Any, Any], CompensatedSum], matmul_precision: str = "highest"):
        """Compiles when first called.

        Args:
          mesh: devices that share the tiles.
          fn: `(shared, batch) -> CompensatedSum` of one tile.
          matmul_precision: precision of float32 products, see `tile_map`.
        """
        self.mesh = mesh

        def add_tile(sums, shared, batch):
            with jax.default_matmul_precision(matmul_precision):
                part = fn(shared, batch)
            total = CompensatedSum(*jax.tree.map(lambda leaf: leaf[0], tuple(sums))) + part
            return jax.tree.map(lambda leaf, old: leaf[None].astype(old.dtype), total, sums)

        specs = (_DATA, PartitionSpec(), _DATA)
        mapped = jax.shard_map(add_tile, mesh=mesh, in_specs=specs, out_specs=_DATA, check_vma=False)
        self.compiled = jax.jit(mapped, donate_argnums=0)
        gathered = jax.shard_map(
            self._in_device_order, mesh=mesh, in_specs=_DATA, out_specs=PartitionSpec(), check_vma=False
        )
        self._reduce = jax.jit(gathered)

    def zero(self, like: Any) -> CompensatedSum:
        """Zeros on every device, with the layout, shapes and dtypes of the tree `like`."""
        sharding = NamedSharding(self.mesh, _DATA)

        def zeros(leaf):
            shape = (self.mesh.size, *leaf.shape)
            return jax.make_array_from_callback(
                shape, sharding, lambda index: np.zeros((1, *leaf.shape), leaf.dtype), dtype=leaf.dtype
            )

        return CompensatedSum(jax.tree.map(zeros, like), jax.tree.map(zeros, like))

    def add(self, sums: CompensatedSum, shared: Any, batch: Any) -> CompensatedSum:
        """Adds one tile on each device; `sums` is donated. `shared` is from `replicate`, `batch` from `shard_batch`."""
        return self.compiled(sums, shared, batch)

    def total(self, sums: CompensatedSum) -> CompensatedSum:
        """The devices' sums added in device order, on this host's first device; `sums` stays as it is."""
        # The devices of a CPU share their threads: one that waits in a collective while another has tiles to do may
        # hold the thread that these need, and XLA then aborts the process.
        jax.block_until_ready(sums)
        high, layout = jax.tree.flatten(sums.high)
        pairs = []
        for leaves in zip(high, jax.tree.leaves(sums.low)):
            # Leaf by leaf: the devices hold no second copy of the whole.
            pair = CompensatedSum(*(part.addressable_data(0) for part in self._reduce(CompensatedSum(*leaves))))
            pairs.append(jax.block_until_ready(pair))
        return CompensatedSum(*(jax.tree.unflatten(layout, [pair[part] for pair in pairs]) for part in range(2)))

    def _in_device_order(self, pair: CompensatedSum) -> CompensatedSum:
        """One leaf's sum over devices: each device adds up a stripe of it in order, so none holds all devices' leaves.

        Never a `psum`, whose order is the backend's.
        """
        count, shape = self.mesh.size, pair.high.shape[1:]

        def stripes(leaf):
            flat = leaf.reshape(-1)
            flat = jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)
            return jax.lax.all_to_all(flat, "data", 0, 0, tiled=True)

        parts = jax.tree.map(stripes, pair)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        others = jax.tree.map(lambda leaf: leaf[1:], parts)
        stripe, _ = jax.lax.scan(lambda total, part: (total + part, None), first, others)
        size = int(np.prod(shape))
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, "data", tiled=True)[:size].reshape(shape), stripe)
