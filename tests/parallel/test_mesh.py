"""Placement over devices, and tiles of one shape."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.parallel.mesh import data_mesh, padded_tiles, replicate, shard_batch, tile_map


@pytest.mark.parametrize("num_rows", [*range(20), 97, 1000])
@pytest.mark.parametrize("tile", [1, 2, 7, 8, 64])
def test_tiles_hold_every_row_once(num_rows, tile):
    indices, mask = padded_tiles(num_rows, tile)
    assert indices.shape == mask.shape == (-(-num_rows // tile), tile)
    assert indices.dtype == np.int32
    assert mask.dtype == bool
    np.testing.assert_array_equal(indices[mask], np.arange(num_rows))
    assert np.all((indices >= 0) & (indices < max(num_rows, 1)))
    # Padding is at the very end, less than one tile of it.
    assert (~mask).sum() < tile or num_rows == 0
    assert not np.any(np.diff(mask.reshape(-1).astype(int)) > 0)


def test_tiles_refuse_impossible_sizes():
    with pytest.raises(ValueError, match="num_rows is -1"):
        padded_tiles(-1, 4)
    with pytest.raises(ValueError, match="tile is 0"):
        padded_tiles(4, 0)


def test_eight_devices_share_a_batch_and_hold_all_parameters():
    script = textwrap.dedent(
        """
        import jax, numpy as np
        from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch
        mesh = data_mesh()
        batch = {"latents": np.arange(48.0, dtype=np.float32).reshape(16, 3), "row_id": np.arange(16)}
        sharded = shard_batch(mesh, batch)
        shapes = [shard.data.shape for shard in sharded["latents"].addressable_shards]
        assert shapes == [(2, 3)] * 8, shapes
        np.testing.assert_array_equal(np.asarray(sharded["latents"]), batch["latents"])
        params = replicate(mesh, {"w": np.ones((3, 2), np.float32), "key": jax.random.key(0)})
        assert [shard.data.shape for shard in params["w"].addressable_shards] == [(3, 2)] * 8
        out = jax.jit(lambda x, w: x @ w)(sharded["latents"], params["w"])
        np.testing.assert_array_equal(np.asarray(out), batch["latents"] @ np.ones((3, 2), np.float32))
        assert len(out.sharding.device_set) == 8
        try:
            shard_batch(mesh, {"latents": np.ones((12, 3))})
        except ValueError as error:
            print(error)
        """
    )
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "latents has shape (12, 3): expected a first axis that is a multiple of this host's 8 devices" in done.stdout


def test_one_device():
    mesh = data_mesh(jax.devices()[:1])
    np.testing.assert_array_equal(shard_batch(mesh, {"x": np.arange(5)})["x"], np.arange(5))
    assert replicate(mesh, [np.ones(2)])[0].sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        shard_batch(mesh, {"x": np.float32(1)})


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
