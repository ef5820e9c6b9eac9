"""Chunks: exact content, detection of damage, and kills at random moments."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from unittest import mock

import numpy as np
import pytest

from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import DamagedFileError, StorageError

FIELDS = {"loss": ((2, 3), np.float32), "row_id": ((), np.int32)}
NUM_ROWS, ROWS = 23, 5


def make(rows: slice) -> dict[str, np.ndarray]:
    ids = np.arange(rows.start, rows.stop, dtype=np.int32)
    loss = np.sin(ids[:, None, None] * 1.7 + np.arange(6).reshape(2, 3)).astype(np.float32)
    return {"loss": loss, "row_id": ids}


def fill(store: ChunkStore) -> list[int]:
    pending = store.pending_chunks()
    for index in pending:
        store.write(index, make(store.rows(index)))
    return pending


def open_store(path) -> ChunkStore:
    return ChunkStore(path, FIELDS, NUM_ROWS, ROWS)


def assert_complete(store: ChunkStore) -> None:
    assert store.pending_chunks() == []
    stored, expected = store.read_all(), make(slice(0, NUM_ROWS))
    assert stored.keys() == expected.keys()
    for name in expected:
        assert stored[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(stored[name], expected[name])


def test_chunks_in_any_order_make_the_whole(tmp_path):
    store = open_store(tmp_path)
    assert store.num_chunks == 5
    assert store.rows(4) == slice(20, 23)
    assert store.pending_chunks() == [0, 1, 2, 3, 4]
    for index in (4, 1):
        store.write(index, make(store.rows(index)))
    with pytest.raises(StorageError, match="chunk 0 "):
        store.read_all()
    assert fill(open_store(tmp_path)) == [0, 2, 3]
    assert_complete(open_store(tmp_path))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other"])
def test_a_damaged_chunk_is_computed_again(tmp_path, caplog, damage, large):
    """A large store is not read whole when it is opened: the chunk is deleted when it is first used."""
    store = open_store(tmp_path)
    fill(store)
    file, other = (store.path / f"chunk-00000{index}.safetensors" for index in (2, 1))
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    file.write_bytes({"flip": flipped, "truncate": whole[:-1], "empty": b"", "other": other.read_bytes()}[damage])
    if large:
        assert store.pending_chunks(checked_bytes=0) == []
        array = store.array("loss")
        np.testing.assert_array_equal(array[0], make(slice(0, 1))["loss"][0])
        with pytest.raises(StorageError, match="chunk-000002"):
            array[11]
    else:
        with pytest.raises(DamagedFileError, match="chunk-000002"):
            store.read(2)
    assert fill(open_store(tmp_path)) == [2]
    assert large or "chunk-000002.safetensors" in caplog.text
    assert_complete(open_store(tmp_path))


def test_the_stored_rows_per_chunk_stay_and_a_cleared_store_keeps_them(tmp_path):
    store = open_store(tmp_path)
    store.write(0, make(store.rows(0)))
    other = ChunkStore(tmp_path, FIELDS, NUM_ROWS, 7)
    assert other.rows_per_chunk == ROWS
    assert fill(other) == [1, 2, 3, 4]
    assert_complete(other)
    other.clear()
    assert fill(ChunkStore(tmp_path, FIELDS, NUM_ROWS, 7)) == list(range(5))


def test_other_rows_or_fields_are_refused_naming_both(tmp_path):
    fill(open_store(tmp_path))
    with pytest.raises(StorageError, match="num_rows .*23.*24"):
        ChunkStore(tmp_path, FIELDS, 24, ROWS)
    with pytest.raises(StorageError, match=r"fields .*loss \(2, 3\) float32.*loss \(2, 4\) float32"):
        ChunkStore(tmp_path, {**FIELDS, "loss": ((2, 4), np.float32)}, NUM_ROWS, ROWS)
    assert_complete(open_store(tmp_path))
    (tmp_path / "chunks" / "layout.json").write_text('{"rows_per')
    with pytest.raises(StorageError, match=r"layout\.json"):
        open_store(tmp_path)


def test_two_stores_in_one_stage(tmp_path):
    text = ChunkStore(tmp_path, {"text": ((4,), np.float16)}, 3, 2, name="text")
    text.write(0, {"text": np.ones((2, 4), np.float16)})
    assert text.pending_chunks() == [1]
    assert open_store(tmp_path).pending_chunks() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("index", "change", "named"),
    [
        (4, lambda arrays: make(slice(0, 5)), r"chunk 4 .*loss \(3, 2, 3\) float32"),
        (4, lambda arrays: {"loss": arrays["loss"]}, "chunk 4 .* row_id"),
        (4, lambda arrays: arrays | {"row_id": arrays["row_id"].astype(np.int64)}, "chunk 4 .* int64"),
        (5, lambda arrays: arrays, "chunk index is 5"),
    ],
)
def test_misshaped_arrays_are_refused(tmp_path, index, change, named):
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=named):
        store.write(index, change(make(store.rows(4))))
    assert store.pending_chunks() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rows", "rows_per_chunk", "named"), [(0, 5, "num_rows is 0"), (23, 0, "rows_per_chunk is 0")])
def test_numbers_of_rows_are_checked(tmp_path, rows, rows_per_chunk, named):
    with pytest.raises(ValueError, match=named):
        ChunkStore(tmp_path, FIELDS, rows, rows_per_chunk)


def test_a_full_disk_keeps_the_finished_chunks(tmp_path):
    store = open_store(tmp_path)
    store.write(0, make(store.rows(0)))
    full = mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(StorageError, match=r"chunk-000001\.safetensors: No space left on device"):
        fill(store)
    assert sorted(os.listdir(store.path)) == ["chunk-000000.safetensors", "layout.json"]
    assert fill(open_store(tmp_path)) == [1, 2, 3, 4]
    assert_complete(open_store(tmp_path))


def test_kills_at_random_moments_lose_nothing_that_was_written(tmp_path):
    """Killed until done, the run gives the bits of an uninterrupted one and computes no stored chunk again."""
    script = textwrap.dedent(
        f"""
        import time
        import numpy as np
        from attrib_jax.storage.chunks import ChunkStore
        from attrib_jax.storage.stages import lock, open_stage

        with lock({str(tmp_path)!r}):
            stage = open_stage({str(tmp_path)!r}, "losses", {{"stride": 100}}, {{"model": "ab"}})
            store = ChunkStore(stage.path, {{"loss": ((1000,), np.float64)}}, 60, 2)
            for index in store.pending_chunks():
                rows = store.rows(index)
                ids = np.arange(rows.start, rows.stop)[:, None]
                print(index, flush=True)
                store.write(index, {{"loss": np.cos(ids * 0.3 + np.arange(1000))}})
            stage.finish()
        """
    )
    seed = random.randrange(2**32)
    delays = random.Random(seed)
    computed, kills = [], 0
    for attempt in range(50):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline()
        if attempt < 3:
            time.sleep(delays.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        computed += (first + process.communicate()[0]).split()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert 30 <= len(computed) <= 30 + kills, f"seed {seed}: {computed}"
    store = ChunkStore(tmp_path / "losses", {"loss": ((1000,), np.float64)}, 60, 2)
    expected = np.cos(np.arange(60)[:, None] * 0.3 + np.arange(1000))
    assert store.read_all()["loss"].tobytes() == expected.tobytes(), f"seed {seed}"
    assert not list(tmp_path.rglob(".partial-*")), f"seed {seed}"


@pytest.mark.parametrize("options", [{}, {"mapped_chunks": 2}])
def test_field_as_an_array_on_disk(tmp_path, options):
    fill(open_store(tmp_path))
    for field, expected in make(slice(0, NUM_ROWS)).items():
        array = open_store(tmp_path).array(field, **options)
        assert array.shape == expected.shape and array.dtype == expected.dtype
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(array), expected)
        rows = np.array([22, 0, 7])
        np.testing.assert_array_equal(array[rows], expected[rows])
