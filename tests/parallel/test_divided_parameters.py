"""Parameters divided over the mesh axis `model`: what each device holds, and results that are those of whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attrib_jax.parallel.mesh as mesh_module
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.curvature.fisher import TokenProduct, sum_squares
from attrib_jax.models.predictor import as_predictor
from attrib_jax.ops.shards import Shard, has_shards
from attrib_jax.parallel.mesh import (
    data_mesh,
    divided_axis,
    host_share,
    mark_shards,
    place_parameters,
    replicate,
    shard_batch,
    tile_map,
)
from attrib_jax.parallel.sums import DeviceSums, divided_like

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": RNG.normal(size=(32, 64)).astype(np.float32), "bias": np.ones(64, np.float32)},
    "last": {"kernel": RNG.normal(size=(64, 32)).astype(np.float32)},
}
ROWS = RNG.normal(size=(8, 32)).astype(np.float32)


def predict(params, noisy, timestep, text):
    hidden = jnp.tanh(noisy @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"]


def loss(params, row):
    return jnp.mean(as_predictor(predict)(params, row, 0, None) ** 2)


@pytest.mark.parametrize(
    ("shape", "parts", "axis"),
    [
        ((64, 32), 4, 0),
        ((32, 64), 4, 1),
        ((64, 64), 2, 0),
        ((3, 3, 32, 30), 4, 2),
        ((33, 31), 2, None),
        ((64, 64), 1, None),
        ((4096,), 2, None),
        ((4, 8), 2, None),
    ],
)
def test_the_longest_axis_that_can_be_is_divided(shape, parts, axis):
    assert divided_axis(jax.ShapeDtypeStruct(shape, np.float32), parts) == axis


@pytest.mark.parametrize("parts", [3, 8, -1])
def test_a_number_that_does_not_divide_the_devices_is_refused(parts):
    with pytest.raises(ValueError, match=f"model_parallel is {parts} and there are 4 devices.*divisor.*1, 2, 4"):
        data_mesh(jax.devices()[:4], parts)


def test_devices_hold_their_parts_alone_and_batches_keep_their_order():
    mesh = data_mesh(jax.devices()[:4], 2)
    assert dict(mesh.shape) == {"data": 2, "model": 2} and list(mesh.devices.flat) == jax.devices()[:4]
    placed = place_parameters(mesh, {**PARAMS, "key": jax.random.key(0)})
    kernel = placed["first"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(32, 32)] * 4
    assert placed["first"]["bias"].sharding.is_fully_replicated and placed["key"].sharding.is_fully_replicated
    np.testing.assert_array_equal(kernel, PARAMS["first"]["kernel"])
    # What lies there already is left, and what is whole there is divided.
    assert place_parameters(mesh, kernel) is kernel
    assert place_parameters(mesh, replicate(mesh, PARAMS["first"]["kernel"])).sharding == kernel.sharding
    marked = mark_shards(placed)
    assert marked["first"]["kernel"].axis == 1 and marked["last"]["kernel"].axis == 0
    assert has_shards(marked) and not has_shards(replicate(mesh, PARAMS))
    assert host_share(mesh, 8) == slice(0, 8)
    batch = shard_batch(mesh, np.arange(8))
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("takes_shards", [True, False])
@pytest.mark.parametrize("parts", [2, 4])
def test_rows_have_the_bits_that_they_have_with_whole_parameters(parts, takes_shards):
    def tile(params, rows):
        assert has_shards(params) == takes_shards
        return jax.lax.map(lambda row: loss(params, row), rows)

    mesh, whole = data_mesh(jax.devices()[:4], parts), data_mesh(jax.devices()[:4])
    expected = tile_map(whole, lambda *args: jax.lax.map(lambda row: loss(args[0], row), args[1]))
    found = tile_map(mesh, tile, takes_shards=takes_shards)(place_parameters(mesh, PARAMS), shard_batch(mesh, ROWS))
    np.testing.assert_array_equal(found, expected(replicate(whole, PARAMS), shard_batch(whole, ROWS)))


def test_a_batch_that_all_devices_share_has_one_result():
    mesh = data_mesh(jax.devices()[:4], 4)
    run = tile_map(mesh, lambda params, row: loss(params, row), takes_shards=True, whole_results=True)
    np.testing.assert_allclose(run(place_parameters(mesh, PARAMS), ROWS[0]), loss(PARAMS, ROWS[0]), rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_gradients_and_their_sums_are_divided_as_the_parameters_are(parts):
    mesh = data_mesh(jax.devices()[:4], parts)

    def tile(params, rows):
        return CompensatedSum.of(jax.grad(lambda params: sum(loss(params, row) for row in rows))(params))

    sums = DeviceSums(mesh, tile, takes_shards=True)
    placed = place_parameters(mesh, PARAMS)
    running = sums.zero(divided_like(mesh, PARAMS))
    kernel = running.high["first"]["kernel"].value
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(1, 32, 64 // parts)] * 4
    for _ in range(2):
        running = sums.add(running, placed, shard_batch(mesh, ROWS))
    found = sums.total(running).value()
    assert found["first"]["kernel"].sharding == placed["first"]["kernel"].sharding
    expected = jax.grad(lambda params: 2 * sum(loss(params, row) for row in ROWS))(PARAMS)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6), found, expected)


def test_no_whole_parameter_is_kept_for_the_backward_pass():
    mesh = data_mesh(jax.devices()[:4], 4)

    def tile(params, row):
        return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Shard) else leaf, _residuals(params, row))

    def _residuals(params, row):
        return jax.vjp(lambda params: loss(params, row), params)[1]

    run = tile_map(mesh, tile, takes_shards=True, whole_results=True)
    kept = jax.eval_shape(run._run, mark_shards(place_parameters(mesh, PARAMS)), ROWS[0])
    assert all(leaf.size < 32 * 64 for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("shape", [(12, 8), (6, 8)])
def test_squares_of_complete_gradients_are_summed_over_a_group(shape, factored, monkeypatch):
    """A kernel that is divided along its inputs or its outputs; one example of each device is padding."""
    monkeypatch.setattr(mesh_module, "_MIN_DIVIDED", 1)
    columns, cotangents = RNG.normal(size=(8, shape[0], 3)), RNG.normal(size=(8, 3, shape[1]))
    batch = tuple(leaf.astype(np.float32) for leaf in (columns, cotangents)) + (np.tile([1, 1, 1, 0], 2),)
    kernel = np.zeros(shape, np.float32)

    def gradients(selected, rest, examples):
        return TokenProduct(*examples[:2]) if factored else examples[0] @ examples[1]

    def tile(mesh, selected, batch):
        like = divided_like(mesh, selected) if "model" in mesh.shape else None
        found = sum_squares(gradients, selected, (), batch, batch[2], 2, like)
        return CompensatedSum((found.sum, found.count), (found.compensation, 0 * found.count))

    def run(mesh):
        sums = DeviceSums(mesh, lambda selected, batch: tile(mesh, selected, batch))
        like = (divided_like(mesh, kernel), np.zeros((), np.int32))
        running = sums.add(sums.zero(like), place_parameters(mesh, kernel), shard_batch(mesh, batch))
        return sums.total(running).value()

    (found, count), (expected, _) = run(data_mesh(jax.devices()[:2], 2)), run(data_mesh(jax.devices()[:1]))
    assert count == 6
    assert found.addressable_shards[0].data.shape == ((6, 8) if shape[0] == 12 else (6, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
