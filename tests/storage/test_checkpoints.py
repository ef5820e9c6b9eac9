"""Training checkpoints: exact restore, kills, damage, and states that do not fit."""

import contextlib
import errno
import gc
import inspect
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import CheckpointManager

from attrib_jax.storage.checkpoints import TrainingCheckpoints, preemption_requested
from attrib_jax.storage.files import StorageError


class TrainState(NamedTuple):
    """The kinds of leaf that training holds: weights, an optimiser's nested state, a typed key, a counter."""

    params: Any
    optimiser: Any
    key: jax.Array
    step: jax.Array


def make_state(seed: int, width: int = 40) -> TrainState:
    key = jax.random.key(seed, impl="threefry2x32")
    params = {
        "dense": {"kernel": jax.random.normal(key, (30, width)), "bias": jnp.full((width,), seed, jnp.bfloat16)},
    }
    optimiser = optax.adamw(1e-3)
    _, opt_state = optimiser.update(params, optimiser.init(params), params)
    return TrainState(params, opt_state, key, jnp.int32(seed))


def assert_same_bits(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert left.dtype == right.dtype
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_restores_the_newest_bits_and_keeps_two(tmp_path):
    like = jax.eval_shape(lambda: make_state(0))
    with TrainingCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.restore_latest(like) is None
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step))
    assert not (tmp_path / "checkpoints" / "10").exists()
    with TrainingCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for template in (like, make_state(0)):
            step, state = checkpoints.restore_latest(template)
            assert step == checkpoints.latest_step == 30
            assert_same_bits(state, make_state(30))


def _halved(state):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float16) if leaf.dtype == jnp.float32 else leaf, state)


def _renamed(state):
    return state._replace(params={"linear": state.params["dense"]})


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        (make_state(1, width=50), r"dense/kernel: found \(30, 40\) float32, expected \(30, 50\)"),
        (_halved(make_state(1)), r"found \(30, 40\) float32, expected \(30, 40\) float16"),
        (_renamed(make_state(1)), r"linear/kernel: found absent, expected \(30, 40\)"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_a_state_that_does_not_fit_is_refused_naming_both_sides(tmp_path, like, difference):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        with pytest.raises(ValueError, match=difference):
            checkpoints.restore_latest(like)
        assert checkpoints.restore_latest(make_state(1))[0] == 1


@pytest.fixture
def _abandoned_reads():
    """orbax leaves the other reads of a failed restore suspended; collected at exit, they would fill the test log."""
    yield
    for candidate in gc.get_objects():
        if inspect.iscoroutine(candidate) and candidate.__name__.startswith("_read_array"):
            with contextlib.suppress(Exception):
                candidate.close()


@pytest.mark.usefixtures("_abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "truncate", "lost"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    victim = largest_file(tmp_path / "2")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.unlink()
    if damage != "lost":
        victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for expected in (1, 2):
            step, state = checkpoints.restore_latest(make_state(0))
            assert step == expected
            assert_same_bits(state, make_state(step))
            checkpoints.save(step + 1, make_state(step + 1))
    # All damaged is an error, not a fresh start.
    for step in (2, 3):
        largest_file(tmp_path / str(step)).unlink()
    for _ in range(2):
        with TrainingCheckpoints(tmp_path, keep=1) as checkpoints:
            with pytest.raises(StorageError, match="step 3"):
                checkpoints.restore_latest(make_state(0))


def test_a_kill_during_save_leaves_whole_checkpoints(tmp_path):
    """The state is a function of the step, so a restored one can be told from a mixture."""
    writer = textwrap.dedent(
        f"""
        import itertools, sys
        import jax.numpy as jnp
        from attrib_jax.storage.checkpoints import TrainingCheckpoints
        checkpoints = TrainingCheckpoints({str(tmp_path)!r})
        for step in itertools.count(1):
            checkpoints.save(step, {{"weights": jnp.full((200, 200), step, jnp.float32)}})
            print(step, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(3):
            returned = int(process.stdout.readline())
        time.sleep(0.013)
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
    returned = int(rest[-1]) if rest else returned
    with TrainingCheckpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest({"weights": jnp.zeros((200, 200))})
        checkpoints.save(step + 1, state)
    assert not list(tmp_path.glob("*tmp*"))
    assert step in (returned, returned + 1)
    np.testing.assert_array_equal(state["weights"], np.full((200, 200), step, np.float32))


def test_a_failing_disk_keeps_the_earlier_checkpoint(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        full = mock.patch.object(
            CheckpointManager, "save", side_effect=OSError(errno.ENOSPC, "No space left on device")
        )
        with full, pytest.raises(StorageError, match="checkpoint 2 .*No space left"):
            checkpoints.save(2, make_state(2))
        assert checkpoints.restore_latest(make_state(0))[0] == 1
    with pytest.raises(ValueError, match="keep is 0"):
        TrainingCheckpoints(tmp_path, keep=0)


def test_sigterm_waits_in_the_block_and_is_handled_as_before_outside():
    seen = []
    outer = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(InterruptedError), preemption_requested() as stopping:
            assert not stopping()
            signal.raise_signal(signal.SIGTERM)
            assert stopping() and not seen
            raise InterruptedError("stored")
        assert not seen
        with preemption_requested():
            signal.raise_signal(signal.SIGTERM)
        # Nobody asked, so it must not be lost.
        assert seen == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_sigterm_is_left_alone_where_it_cannot_be_handled():
    handlers = []

    def in_thread():
        with preemption_requested() as stopping:
            handlers.extend([signal.getsignal(signal.SIGTERM), stopping()])

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM), False]
    outer = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with preemption_requested() as stopping:
            signal.raise_signal(signal.SIGTERM)
            assert not stopping()
    finally:
        signal.signal(signal.SIGTERM, outer)


@pytest.mark.parametrize("item", ["leaves", "checksum"])
def test_a_flipped_bit_in_the_description_of_a_checkpoint_is_noticed(tmp_path, item):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    file = tmp_path / "2" / item / "metadata"
    whole = file.read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 10):
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        with TrainingCheckpoints(tmp_path) as checkpoints:
            step, state = checkpoints.restore_latest(make_state(0))
        assert_same_bits(state, make_state(step))
        (damaged,) = tmp_path.glob("damaged-2-*")
        damaged.rename(tmp_path / "2")
