"""Devices: batches are split over all of them; parameters are on every device, or divided over the axis `model`.

With the second axis every device still runs the program that one device alone would run on its own tile of examples.
Of a divided parameter it holds a part, and the devices of its group gather the whole where a layer reads it
(`attrib_jax/ops/shards.py`). So dividing changes the memory that parameters take, and not which products are taken.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attrib_jax.ops.shards import MODEL_AXIS, Shard, gather, map_parameters

# Leaves of fewer numbers are on every device: gathering them would take longer than they save.
_MIN_DIVIDED = 2**10


def data_mesh(devices: Sequence[jax.Device] | None = None, model_parallel: int = 1) -> Mesh:
    """A mesh over `devices`, by default all devices of all hosts, one host after the other.

    It has the axis `data`, and with `model_parallel` above 1 the axis `model` of that size: the devices of a group,
    which divide the parameters among themselves, follow each other. Raises ValueError where the number of devices is no
    multiple of `model_parallel`.
    """
    if devices is None:
        # On a TPU pod `jax.devices()` follows the torus, which mixes hosts.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if model_parallel < 1 or len(devices) % model_parallel:
        divisors = [str(size) for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise ValueError(
            f"model_parallel is {model_parallel} and there are {len(devices)} devices: expected a divisor of their "
            f"number, {', '.join(divisors)}. Change model_parallel, or the devices"
        )
    if model_parallel == 1:
        return Mesh(np.asarray(devices), ("data",))
    return Mesh(np.asarray(devices).reshape(-1, model_parallel), ("data", MODEL_AXIS))


def num_parts(mesh: Mesh) -> int:
    """How many parts a parameter is divided into: the size of the axis `model`, 1 where there is none."""
    return mesh.shape.get(MODEL_AXIS, 1)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """How the first axis of a batch is split: over all devices of `mesh`, in their order."""
    return PartitionSpec("data") if num_parts(mesh) == 1 else PartitionSpec(("data", MODEL_AXIS))


def mesh_platform(mesh: Mesh) -> str:
    """The platform of the devices of `mesh`, such as "cpu", "cuda" (as "gpu") or "tpu"."""
    return mesh.devices.flat[0].platform


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Splits the first axis of every leaf over the devices of `mesh`.

    Leaves are this host's share, (B, ...) with B a multiple of the host's devices in the mesh; the global arrays hold
    the shares of all hosts one after the other. Raises ValueError naming a leaf whose B is not such a multiple.
    """
    local = len(mesh.local_devices)
    sharding = NamedSharding(mesh, batch_spec(mesh))

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


def divided_axis(leaf: Any, parts: int) -> int | None:
    """The axis along which a parameter is divided into `parts`; None for one that every device holds whole.

    It is the longest axis whose length is a multiple of `parts`, the first of several. Vectors and small matrices stay
    whole, as does what has no such axis.
    """
    if parts == 1 or leaf.ndim < 2 or leaf.size < _MIN_DIVIDED or not jax.numpy.issubdtype(leaf.dtype, np.floating):
        return None
    axes = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
    return max(axes, key=lambda axis: leaf.shape[axis]) if axes else None


def parameter_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """How a parameter lies on the devices of `mesh`, see `divided_axis`; of `leaf` shape and dtype count."""
    axis = divided_axis(leaf, num_parts(mesh))
    return NamedSharding(mesh, PartitionSpec() if axis is None else shard_spec(axis))


def shard_spec(axis: int, *before: Any) -> PartitionSpec:
    """The division of a parameter's axis number `axis`, with the axes `before` put in front of it."""
    return PartitionSpec(*before, *(None,) * axis, MODEL_AXIS)


def place_parameters(mesh: Mesh, tree: Any) -> Any:
    """Puts parameters on the devices of `mesh`, divided where it has the axis `model`; all hosts give the same values.

    Leaf by leaf, and of each leaf its part alone, so that no device ever holds what it need not. Leaves that lie on
    these devices already are laid out anew where they lie otherwise.
    """
    if num_parts(mesh) == 1:
        return replicate(mesh, tree)

    def put(leaf):
        if divided_axis(leaf, num_parts(mesh)) is None:
            return replicate(mesh, leaf)
        sharding = parameter_sharding(mesh, leaf)
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == sharding.device_set:
            return leaf if leaf.sharding == sharding else jax.jit(_same, out_shardings=sharding)(leaf)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def constrain_parameters(mesh: Mesh, tree: Any) -> Any:
    """Within `jit`: fixes that `tree` lies on the devices as `place_parameters` would put it."""
    if num_parts(mesh) == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, parameter_sharding(mesh, leaf)), tree)


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def mark_shards(tree: Any) -> Any:
    """`tree` with those of its arrays that are divided over the axis `model` as `Shard`s."""

    def mark(leaf):
        sharding = getattr(leaf, "sharding", None)
        spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
        return Shard(leaf, spec.index(MODEL_AXIS)) if MODEL_AXIS in spec else leaf

    return jax.tree.map(mark, tree)


def part_specs(tree: Any) -> Any:
    """The specs of `jax.shard_map` for a tree of parameters, of which `Shard`s are divided."""
    return map_parameters(lambda node: shard_spec(node.axis) if isinstance(node, Shard) else PartitionSpec(), tree)


def host_share(mesh: Mesh, count: int) -> slice:
    """Which of the `count` rows of a batch over all devices of `mesh` this host feeds to `shard_batch`.

    `count` is a multiple of the number of devices. `data_mesh` orders devices by host, so a host's rows are together.
    """
    first = next(place for place, device in enumerate(mesh.devices.flat) if device in mesh.local_devices)
    rows = count // mesh.size
    return slice(first * rows, (first + len(mesh.local_devices)) * rows)


def tile_map(
    mesh: Mesh,
    fn: Callable[[Any, Any], Any],
    matmul_precision: str | None = "highest",
    *,
    takes_shards: bool = False,
    whole_results: bool = False,
) -> Callable[[Any, Any], Any]:
    """Compiles `fn(shared, batch) -> results` so that every device runs it on one tile.

    Returns a function of the same arguments whose batch holds one tile for each device of `mesh`, one after the other
    along the first axis of every leaf, as do the results. `shared` is whole on every device, or divided where it is
    from `place_parameters`. Each device runs the program that one device alone would run on its tile, so a row's result
    does not depend on the number of devices.

    Args:
      mesh: the devices.
      fn: see above.
      matmul_precision: that of float32 products: `highest`, or what else `jax.default_matmul_precision` takes; None for
        that which is set where the function is called.
      takes_shards: whether divided parameters reach `fn` as `Shard`s, which predictors take. If not, every device
        gathers all of them before `fn` runs, and has to have room for them.
      whole_results: whether the batch is the same on all devices, and so are the results.
    """

    def traced(shared, batch):
        # Here and not only in the commands: a loss must not depend on who calls. A GPU's or TPU's default would round
        # the factors of every product.
        with jax.default_matmul_precision(matmul_precision):
            return fn(shared, batch)

    traced = fn if matmul_precision is None else traced
    data = PartitionSpec() if whole_results else batch_spec(mesh)
    if num_parts(mesh) == 1:
        # Without check_vma=False the gradient by `shared`, which all devices hold, would be summed over the devices.
        specs = (PartitionSpec(), data)
        return jax.jit(jax.shard_map(traced, mesh=mesh, in_specs=specs, out_specs=data, check_vma=False))
    return _Divided(mesh, traced, data, takes_shards)


class _Divided:
    """A function of `tile_map` on a mesh with the axis `model`: which leaves are divided, each call tells."""

    def __init__(self, mesh: Mesh, fn: Callable[[Any, Any], Any], data: PartitionSpec, takes_shards: bool):
        def local(shared, batch):
            return fn(shared if takes_shards else gather(shared), batch)

        def run(shared, batch):
            specs = (part_specs(shared), data)
            mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=data, check_vma=False)
            return mapped(shared, batch)

        self._run = jax.jit(run)

    def __call__(self, shared: Any, batch: Any) -> Any:
        return self._run(mark_shards(shared), batch)

    def lower(self, shared: Any, batch: Any) -> Any:
        """As `lower` of a compiled function; arguments may be `jax.ShapeDtypeStruct`s with shardings."""
        return self._run.lower(mark_shards(shared), batch)


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
