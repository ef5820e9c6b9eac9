"""The checkpointed sum: the same bits after kills and damage, and never the sum of something else."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.storage.files import StorageError
from attrib_jax.storage.state import StateStore


class Sum(NamedTuple):
    """A running sum of the shape that a curvature estimate has."""

    total: Any
    count: Any


def make(value: float) -> Sum:
    kernel = np.full((3, 2), value, np.float64) / 3
    return Sum({"a": {"kernel": kernel}, "b": jnp.full((2,), value, jnp.float32)}, np.int64(value))


def assert_same(actual: Sum, expected: Sum) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(left, right, strict=True)


def assert_stored(path, step: int) -> None:
    tree, progress = StateStore(path).read(make(0))
    assert progress == step
    assert_same(tree, make(step))


def newest_file(store: StateStore):
    return max(store.path.glob("state-*"), key=lambda path: path.stat().st_mtime_ns)


def test_the_newest_state_is_read(tmp_path):
    store = StateStore(tmp_path)
    assert store.read(make(0)) is None
    assert os.listdir(tmp_path) == []
    for step in range(1, 6):
        store.write(make(step), step)
        assert_stored(tmp_path, step)
    assert len(os.listdir(store.path)) == 2
    store.remove()
    assert os.listdir(tmp_path) == [] and store.read(make(0)) is None
    store.write(make(1), {"batch": [1, 2]})
    assert StateStore(tmp_path).read(make(0))[1] == {"batch": [1, 2]}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, damage):
    store = StateStore(tmp_path)
    for step in (1, 2, 3):
        store.write(make(step), step)
    file = newest_file(store)
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 16]) + whole[-2:]
    file.write_bytes({"flip": flipped, "truncate": whole[:-3], "empty": b""}[damage])
    assert_stored(tmp_path, 2)
    store = StateStore(tmp_path)
    store.read(make(0))
    store.write(make(3), 3)
    assert_stored(tmp_path, 3)
    # It took the place of the damaged one.
    newest_file(store).unlink()
    assert_stored(tmp_path, 2)


def test_another_sum_is_refused_naming_both_sides(tmp_path):
    StateStore(tmp_path).write(make(1), 1)
    other = make(0)
    other.total["b"] = np.zeros(2, np.float64)
    other.total["c"] = np.zeros(1)
    with pytest.raises(StorageError) as caught:
        StateStore(tmp_path).read(other)
    assert "total/b: found (2,) float32, expected (2,) float64" in str(caught.value)
    assert "total/c: found absent, expected (1,) float64" in str(caught.value)
    assert "kernel" not in str(caught.value)


def test_a_full_disk_keeps_the_state_before(tmp_path):
    store = StateStore(tmp_path)
    store.write(make(1), 1)
    with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        for _ in range(2):
            with pytest.raises(StorageError, match="No space left on device"):
                store.write(make(2), 2)
    assert_stored(tmp_path, 1)
    store.write(make(2), 2)
    assert_stored(tmp_path, 2)


def test_a_killed_sum_resumes_to_the_same_bits(tmp_path):
    """Terms of very different size, so that a lost, doubled or reordered one changes the float32 sum."""
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        from attrib_jax.storage.state import StateStore

        store = StateStore(sys.argv[1])
        total, start = {"sum": np.zeros(5000, np.float32)}, 0
        stored = store.read(total)
        if stored is not None:
            total, start = stored
        for step in range(start, 60):
            term = np.random.default_rng(step).lognormal(sigma=4, size=5000).astype(np.float32)
            total = {"sum": total["sum"] + term}
            store.write(total, step + 1)
            print(step, flush=True)
        """
    )
    command = [sys.executable, "-c", script]
    seed = random.randrange(2**32)
    process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert len(resumed.stdout.split()) < 60, f"seed {seed}: the sum started anew"
    expected = np.zeros(5000, np.float32)
    for step in range(60):
        expected = expected + np.random.default_rng(step).lognormal(sigma=4, size=5000).astype(np.float32)
    tree, progress = StateStore(tmp_path).read({"sum": np.zeros(5000, np.float32)})
    assert progress == 60
    assert tree["sum"].tobytes() == expected.tobytes(), f"seed {seed}"
