"""Sums over devices: fixed order, compensated, exact counts."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch
from attrib_jax.parallel.sums import DeviceSums


def _add_up(values: np.ndarray, devices: int) -> CompensatedSum:
    """Sums rows (tiles, devices, ...) whose first tile is the first device's."""
    mesh = data_mesh(jax.devices()[:devices])

    def tile(shared, batch):
        part = {"value": shared * batch[0], "count": jnp.int32(1)}
        return CompensatedSum.of(part)

    sums = DeviceSums(mesh, tile)
    running = sums.zero({"value": values[0], "count": np.zeros((), np.int32)})
    shared = replicate(mesh, np.ones((), values.dtype))
    for start in range(0, len(values), devices):
        running = sums.add(running, shared, shard_batch(mesh, values[start : start + devices]))
    total = sums.total(running)
    # Asking changes nothing.
    jax.tree.map(np.testing.assert_array_equal, total, sums.total(running))
    return total


@pytest.mark.parametrize("devices", [1, 3, 4])
@pytest.mark.parametrize("shape", [(), (3, 4, 2)])
def test_sums_do_not_drift_and_counts_are_exact(devices, shape):
    rng = np.random.default_rng(0)
    # A large value first: a plain float32 sum would lose all of the small ones.
    values = rng.uniform(0.5, 1.5, (24, *shape)).astype(np.float32)
    values[0] = 2.0**26
    total = _add_up(values, devices)
    expected = values.astype(np.float64).sum(axis=0)
    np.testing.assert_array_equal(total.value()["value"], expected.astype(np.float32))
    high, low = (np.asarray(side["value"], np.float64) for side in (total.high, total.low))
    np.testing.assert_allclose(high + low, expected, rtol=1e-12)
    assert int(total.high["count"]) == 24 and int(total.low["count"]) == 0
    assert total.high["count"].dtype == jnp.int32


def test_sums_are_asked_for_while_tiles_are_still_to_do():
    # Devices of a CPU share threads. Where one waited for the others' sums in a thread that their tiles needed, XLA
    # aborted the process after a minute, as soon as nothing was left to compile.
    mesh = data_mesh(jax.devices()[:4])
    like = {"w": np.eye(256, dtype=np.float32), **{f"leaf{i}": np.zeros((256, 256), np.float32) for i in range(16)}}

    def tile(shared, batch):
        x = batch[0]
        for _ in range(20):
            x = jnp.tanh(x @ shared["w"])
        part = jax.tree.map(lambda leaf: leaf + jnp.mean(x), shared)
        return CompensatedSum.of(part)

    sums, shared = DeviceSums(mesh, tile), replicate(mesh, like)
    batch = shard_batch(mesh, np.ones((4, 256, 256), np.float32))
    totals = []
    for _ in range(4):
        running = sums.zero(like)
        for _ in range(6):
            running = sums.add(running, shared, batch)
        totals.append(sums.total(running).value())
    for again in totals[1:]:
        jax.tree.map(np.testing.assert_array_equal, totals[0], again)


def test_devices_are_added_in_their_order():
    # In this order, and in no other, the pair's low part is what a sequential two-sum leaves.
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(4, 7)) * 10.0 ** rng.integers(-12, 12, (4, 7))).astype(np.float32)
    total = _add_up(values, 4)
    zero = np.zeros(7, np.float32)
    terms = [CompensatedSum(row, zero) for row in values]
    expected, backwards = (functools.reduce(operator.add, order) for order in (terms, terms[::-1]))
    np.testing.assert_array_equal(total.high["value"], expected.high)
    np.testing.assert_array_equal(total.low["value"], expected.low)
    assert not np.array_equal(backwards.low, expected.low)


def test_the_sum_so_far_is_used_up_and_the_devices_hold_one_each():
    mesh = data_mesh()
    sums = DeviceSums(mesh, lambda shared, batch: CompensatedSum(batch[0], jnp.zeros_like(batch[0])))
    before = sums.zero(np.zeros(6, np.float32))
    assert [shard.data.shape for shard in before.high.addressable_shards] == [(1, 6)] * mesh.size
    after = sums.add(before, None, shard_batch(mesh, np.ones((mesh.size, 6), np.float32)))
    assert before.high.is_deleted() and before.low.is_deleted()
    np.testing.assert_array_equal(after.high, np.ones((mesh.size, 6)))
    assert len(sums.total(after).high.devices()) == 1
