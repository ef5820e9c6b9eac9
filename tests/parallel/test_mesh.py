"""Placement over devices, and tiles of one shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.parallel.mesh import data_mesh, padded_tiles, replicate, shard_batch, tile_map


@pytest.mark.parametrize("tile", [1, 2, 7, 8, 64])
def test_tiles_hold_every_row_once(tile):
    for num_rows in (*range(20), 97, 1000):
        indices, mask = padded_tiles(num_rows, tile)
        assert indices.shape == mask.shape == (-(-num_rows // tile), tile)
        assert indices.dtype == np.int32 and mask.dtype == bool
        np.testing.assert_array_equal(indices[mask], np.arange(num_rows))
        assert np.all((indices >= 0) & (indices < max(num_rows, 1)))
        # Padding is at the very end, less than one tile of it.
        assert (~mask).sum() < tile or num_rows == 0
        assert not np.any(np.diff(mask.reshape(-1).astype(int)) > 0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: padded_tiles(-1, 4), "num_rows is -1"),
        (lambda: padded_tiles(4, 0), "tile is 0"),
        (lambda: shard_batch(data_mesh(), {"x": np.float32(1)}), r"x has shape \(\)"),
        (lambda: shard_batch(data_mesh(), {"x": np.ones((6, 3))}), r"x has shape \(6, 3\)"),
    ],
)
def test_impossible_sizes_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_devices_share_a_batch_and_hold_all_parameters():
    mesh = data_mesh()
    count = mesh.size
    assert count > 1
    batch = {"latents": np.arange(6.0 * count, dtype=np.float32).reshape(2 * count, 3), "row_id": np.arange(2 * count)}
    sharded = shard_batch(mesh, batch)
    assert [shard.data.shape for shard in sharded["latents"].addressable_shards] == [(2, 3)] * count
    np.testing.assert_array_equal(sharded["latents"], batch["latents"])
    params = replicate(mesh, {"w": np.ones((3, 2), np.float32), "key": jax.random.key(0)})
    assert [shard.data.shape for shard in params["w"].addressable_shards] == [(3, 2)] * count
    out = jax.jit(lambda x, w: x @ w)(sharded["latents"], params["w"])
    np.testing.assert_array_equal(out, batch["latents"] @ np.ones((3, 2), np.float32))
    assert len(out.sharding.device_set) == count
    alone = data_mesh(jax.devices()[:1])
    np.testing.assert_array_equal(shard_batch(alone, {"x": np.arange(5)})["x"], np.arange(5))
    assert replicate(alone, [np.ones(2)])[0].sharding.is_fully_replicated


def test_a_row_has_the_same_bits_on_one_device_and_on_all():
    devices = jax.devices()
    assert len(devices) > 1
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 64)).astype(np.float32)
    batch = {"x": rng.normal(size=(3 * len(devices), 64)).astype(np.float32)}

    def tile_losses(shared, tile):
        return jax.numpy.mean(jax.numpy.tanh(tile["x"] @ shared) ** 2, axis=-1)

    mesh = data_mesh(devices)
    together = tile_map(mesh, tile_losses)(replicate(mesh, weights), shard_batch(mesh, batch))
    alone = data_mesh(devices[:1])
    run = tile_map(alone, tile_losses)
    one_by_one = [
        run(replicate(alone, weights), shard_batch(alone, {"x": batch["x"][start : start + 3]}))
        for start in range(0, len(batch["x"]), 3)
    ]
    np.testing.assert_array_equal(np.asarray(together), np.concatenate(one_by_one))
    expected = np.mean(np.tanh(batch["x"].astype(np.float64) @ weights) ** 2, axis=-1)
    np.testing.assert_allclose(together, expected, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients_by_what_all_devices_share_are_each_rows_own(count):
    mesh = data_mesh(jax.devices()[:count])
    rows, weights = np.arange(24, dtype=np.float32).reshape(8, 3), np.ones(3, np.float32)

    def gradients(weights, rows):
        return jax.vmap(lambda row: jax.grad(lambda w: jnp.sum(w**2 * row))(weights))(rows)

    result = tile_map(mesh, gradients)(replicate(mesh, weights), shard_batch(mesh, rows))
    np.testing.assert_array_equal(np.asarray(result), 2 * rows)
