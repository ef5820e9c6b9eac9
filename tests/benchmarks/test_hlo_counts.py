"""Counts in XLA programs, against programs whose operations and arrays are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attrib_jax.parallel.mesh import data_mesh
from benchmarks.hlo_counts import count_flops, count_traffic, parse


def texts(fn, *args):
    lowered = jax.jit(fn).lower(*args)
    return parse(lowered.as_text(dialect="hlo")), parse(lowered.compile().as_text())


def products(x, steps):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x), None), x, None, length=steps)[0]


@pytest.mark.parametrize("steps", [1, 7])
def test_products_of_a_loop_count_as_often_as_they_run(steps):
    before, compiled = texts(lambda x: products(x, steps), jnp.zeros((32, 32)))
    assert count_flops(before) == steps * 2 * 32**3
    traffic = count_traffic(compiled)
    # Each turn reads two matrices and writes one, at least.
    assert traffic.bytes >= steps * 3 * 32 * 32 * 4 and traffic.unknown_loops == 0


def test_convolutions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    before, _ = texts(convolve, jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5)))
    assert count_flops(before) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_a_slice_of_a_large_array_is_not_the_array():
    def rows(table):
        return jax.lax.scan(lambda total, row: (total + jnp.sin(row), None), jnp.zeros(64), table)[0]

    traffic = count_traffic(texts(rows, jnp.zeros((1000, 64)))[1])
    assert traffic.bytes < 1000 * 64 * 4 * 8


def test_collectives_are_told_by_kind():
    mesh = data_mesh()
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    traffic = count_traffic(texts(total, np.zeros((mesh.size, 4), np.float32))[1])
    assert set(traffic.collectives) == ({"all-reduce"} if mesh.size > 1 else set())


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty")
