"""The one device axis, `data`: batches are split along it, parameters are on every device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A 1-D mesh with the axis `data` over `devices`, by default all devices of all hosts, one host after the other."""
    if devices is None:
        # On a TPU pod `jax.devices()` follows the torus, which mixes hosts.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), ("data",))


def mesh_platform(mesh: Mesh) -> str:
    """The platform of the devices of `mesh`, such as "cpu", "cuda" (as "gpu") or "tpu"."""
    return mesh.devices.flat[0].platform


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Splits the first axis of every leaf over the devices of `mesh`.

    Leaves are this host's share, (B, ...) with B a multiple of the host's devices in the mesh; the global arrays hold
    the shares of all hosts one after the other. Raises ValueError naming a leaf whose B is not such a multiple.
    """
    local = len(mesh.local_devices)
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def put(path, leaf):
        if leaf.ndim == 0 or leaf.shape[0] % local:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
            raise ValueError(
                f"{name} has shape {leaf.shape}: expected a first axis that is a multiple of this host's {local} "
                "devices. Pad the batch with masked rows."
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree_util.tree_map_with_path(put, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Replicates every leaf on all devices of `mesh`; all hosts must give the same values, which is not checked."""
    whole = NamedSharding(mesh, PartitionSpec())
    if not mesh.is_multi_process:
        return jax.device_put(tree, whole)
    local = NamedSharding(mesh.local_mesh, PartitionSpec())

    def put(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == whole:
            return leaf
        # Placed by each host: `device_put` onto other hosts' devices would send every value around to compare it.
        leaf = jax.device_put(leaf, local)
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, whole, shards)

    return jax.tree.map(put, tree)


def host_share(mesh: Mesh, count: int) -> slice:
    """Which of the `count` rows of a batch over all devices of `mesh` this host feeds to `shard_batch`.

    `count` is a multiple of the number of devices. `data_mesh` orders devices by host, so a host's rows are together.
    """
    first = next(place for place, device in enumerate(mesh.devices.flat) if device in mesh.local_devices)
    rows = count // mesh.size
    return slice(first * rows, (first + len(mesh.local_devices)) * rows)


def tile_map(
    mesh: Mesh, fn: Callable[[Any, Any], Any], matmul_precision: str | None = "highest"
) -> Callable[[Any, Any], Any]:
    """Compiles `fn(shared, batch) -> results` so that every device runs it on one tile.

    Returns a function of the same arguments whose batch holds one tile for each device of `mesh`, one after the other
    along the first axis of every leaf, as do the results. `shared` is whole on every device. Each device runs the
    program that one device alone would run on its tile, so a row's result does not depend on the number of devices.

    `matmul_precision` is that of float32 products: `highest`, or what else `jax.default_matmul_precision` takes; None
    for that which is set where the function is called.
    """

    def traced(shared, batch):
        # Here and not only in the commands: a loss must not depend on who calls. A GPU's or TPU's default would round
        # the factors of every product.
        with jax.default_matmul_precision(matmul_precision):
            return fn(shared, batch)

    traced = fn if matmul_precision is None else traced
    # Without check_vma=False the gradient by `shared`, which all devices hold, would be summed over the devices.
    data, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(jax.shard_map(traced, mesh=mesh, in_specs=(whole, data), out_specs=data, check_vma=False))


def padded_tiles(num_rows: int, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts `num_rows` rows into tiles of one fixed shape, so that a row's result does not depend on the batch size.

    Returns:
      indices: (T, tile) int32, T = ceil(num_rows / tile); the last tile is padded with the last row, a valid one.
      mask: (T, tile) bool, False for padding.

    Raises:
      ValueError: `num_rows` is negative or `tile` below 1.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}: expected at least 0")
    if tile < 1:
        raise ValueError(f"tile is {tile}: expected at least 1")
    positions = np.arange(-(-num_rows // tile) * tile, dtype=np.int32).reshape(-1, tile)
    return np.minimum(positions, max(num_rows - 1, 0)), positions < num_rows
