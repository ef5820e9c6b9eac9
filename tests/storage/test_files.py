"""Files of a stage: round trips, damage that is noticed, and errors that name the path; the rest is in test_durable."""

import errno
import os
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.storage import files
from attrib_jax.storage.files import DamagedFileError, StorageError

ARRAYS = {
    "loss": np.random.default_rng(0).normal(size=(3, 2, 4)),
    "half": np.ones((2, 3), np.float16).T,
    "scalar": np.float32(np.nan),
    "empty": np.zeros((0, 5), np.int32),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("read", [files.read_arrays, files.map_arrays])
def test_arrays_round_trip_with_dtype_shape_and_header(tmp_path, read):
    files.write_arrays(tmp_path / "a", ARRAYS, {"rows": [0, 3]})
    stored, header = read(tmp_path / "a")
    assert header == {"rows": [0, 3]}
    assert stored.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name], array)
    if read is files.map_arrays:
        with pytest.raises(ValueError, match="read-only"):
            stored["loss"][0, 0] = 1
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


def test_json_and_npz_round_trip(tmp_path):
    files.write_json(tmp_path / "a.json", {"name": "Käse", "sizes": [1, 2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "name": "Käse",\n  "sizes": [\n    1,\n    2\n  ]\n}\n'
    files.write_npz(tmp_path / "a.npz", {"row_id": np.arange(3)})
    with np.load(tmp_path / "a.npz") as stored:
        np.testing.assert_array_equal(stored["row_id"], np.arange(3))


@pytest.mark.parametrize("read", [files.read_arrays, files.map_arrays])
def test_a_flip_in_any_byte_and_any_truncation_are_detected(tmp_path, read):
    path = tmp_path / "a"
    arrays = {"x": np.arange(3, dtype=np.float32), "y": np.arange(1, dtype=np.int16)}
    files.write_arrays(path, arrays, {"rows": [0, 4]})
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            stored, header = read(path)
        except DamagedFileError:
            continue
        # A flip in the header's blank padding changes nothing; anything else that passes must read the same.
        same = header == {"rows": [0, 4]} and stored.keys() == arrays.keys()
        same = same and all(stored[k].dtype == arrays[k].dtype for k in arrays)
        if not (same and all(np.array_equal(stored[k], arrays[k]) for k in arrays)):
            unnoticed.append(position)
    assert not unnoticed
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError):
            read(path)


def test_a_map_may_leave_out_the_check(tmp_path):
    files.write_arrays(tmp_path / "a", {"x": np.arange(100, dtype=np.float32)}, {})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files.map_arrays(tmp_path / "a", check=False)[0]["x"].shape == (100,)
    assert files.stored_arrays(tmp_path / "a") is None


@pytest.mark.parametrize(
    ("write", "error", "named"),
    [
        (lambda path: files.write_json(path, {"x": object()}), TypeError, "object"),
        (lambda path: files.write_arrays(path, {"x": np.ones(2, jnp.bfloat16)}, {}), ValueError, "'x': 'bfloat16'"),
        (lambda path: files.write_arrays(path, {"x": np.ones(2, object)}, {}), ValueError, "'x': 'object'"),
        (lambda path: files.write_arrays(path, {}, {"x": float("nan")}), ValueError, "JSON"),
    ],
)
def test_values_that_cannot_be_stored_write_nothing(tmp_path, write, error, named):
    with pytest.raises(error, match=named):
        write(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_refusing_disk_is_a_storage_error_that_names_the_path(tmp_path):
    files.write_bytes(tmp_path / "stage.json", b"old")
    refusing = mock.patch.object(os, "replace", side_effect=OSError(errno.EROFS, "Read-only file system"))
    with refusing, pytest.raises(StorageError, match=rf"{tmp_path}/stage\.json.*Read-only file system"):
        files.write_bytes(tmp_path / "stage.json", b"new")
    assert (tmp_path / "stage.json").read_bytes() == b"old"


def test_parents_of_a_new_folder_are_on_disk_when_it_is_returned(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    folder = files.make_folder(tmp_path / "work" / "losses")
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "work").stat().st_ino]
    assert files.make_folder(folder) == folder and len(synced) == 2


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "losses").mkdir()
    for name in (".partial-x-a", "losses/.partial-y-b", "losses/kept"):
        (tmp_path / name).write_text("half")
    files.remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "losses"]
