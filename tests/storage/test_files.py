"""Atomic writes: what a reader sees after each way that a write can fail."""

import errno
import os
import subprocess
import sys
import tempfile
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.storage import files
from attrib_jax.storage.files import DamagedFileError, StorageError


def test_round_trips(tmp_path):
    files.write_json(tmp_path / "a.json", {"name": "Käse", "sizes": [1, 2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "name": "Käse",\n  "sizes": [\n    1,\n    2\n  ]\n}\n'
    files.write_npz(tmp_path / "a.npz", {"score": np.arange(3.0), "row_id": np.arange(3)})
    with np.load(tmp_path / "a.npz") as stored:
        np.testing.assert_array_equal(stored["score"], [0.0, 1.0, 2.0])
        assert stored["row_id"].dtype == np.int64
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == 0o666 & ~mask


def test_arrays_round_trip_with_dtype_shape_and_header(tmp_path):
    arrays = {
        "loss": np.random.default_rng(0).normal(size=(3, 2, 4)),
        "half": np.ones((2, 3), np.float16).T,
        "scalar": np.float32(np.nan),
        "empty": np.zeros((0, 5), np.int32),
    }
    files.write_arrays(tmp_path / "a", arrays, {"rows": [0, 3]})
    stored, header = files.read_arrays(tmp_path / "a")
    assert header == {"rows": [0, 3]}
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name], array)


def test_a_flip_in_any_byte_and_any_truncation_are_detected(tmp_path):
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
            stored, header = files.read_arrays(path)
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
            files.read_arrays(path)


def test_dtype_that_cannot_be_stored_is_named(tmp_path):
    for dtype in (jnp.bfloat16, object):
        with pytest.raises(ValueError, match=rf"cannot be stored: {{'x': '{np.dtype(dtype)}'}}. Cast"):
            files.write_arrays(tmp_path / "a", {"x": np.ones(2, dtype), "y": np.ones(2)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_failing_call_keeps_the_old_content_and_leaves_no_temporary(tmp_path, monkeypatch, call, code):
    path = tmp_path / "stage.json"
    files.write_bytes(path, b"old")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile if call == "mkstemp" else os, call, fail)
    with pytest.raises(StorageError, match=rf"cannot write .*stage\.json: {os.strerror(code)}"):
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["stage.json"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_keeps_the_old_content(tmp_path, error):
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    with pytest.raises(error), files.atomic_write(path) as file:
        file.write(b"half")
        raise error("stop")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def calls(monkeypatch):
    """The names of what is synced and renamed, in order."""
    made = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor):
        made.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(call, old, new):
        made.append(("rename", os.path.basename(new)))
        call(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: renamed(replace, old, new))
    monkeypatch.setattr(os, "rename", lambda old, new: renamed(rename, old, new))
    return made


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="tells names of descriptors by /proc")


@needs_proc
def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(tmp_path, calls):
    """What a power loss may take is decided by the order: a name never stands for content that is not there."""
    files.write_bytes(tmp_path / "a", b"new")
    (kind, temporary), *rest = calls
    assert kind == "sync" and temporary.endswith("-a")
    assert rest == [("rename", "a"), ("sync", tmp_path.name)]


@needs_proc
def test_a_new_folder_is_on_disk_when_it_is_returned(tmp_path, calls):
    files.make_folder(tmp_path / "work" / "losses")
    assert calls == [("sync", tmp_path.name), ("sync", "work")]
    files.make_folder(tmp_path / "work" / "losses")
    assert len(calls) == 2


@needs_proc
def test_a_folder_takes_its_name_when_all_that_it_holds_is_on_disk(tmp_path, calls):
    (tmp_path / "new" / "inner").mkdir(parents=True)
    (tmp_path / "new" / "inner" / "a").write_bytes(b"a")
    files.commit_folder(tmp_path / "new", tmp_path / "tokenizer")
    assert sorted(calls[:3]) == [("sync", "a"), ("sync", "inner"), ("sync", "new")]
    assert calls[3:] == [("rename", "tokenizer"), ("sync", tmp_path.name)]
    assert (tmp_path / "tokenizer" / "inner" / "a").read_bytes() == b"a"
    with pytest.raises(StorageError, match="cannot write .*absent2: No such file"):
        files.commit_folder(tmp_path / "absent", tmp_path / "absent2")


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_bytes(files.make_folder(tmp_path / "b") / "a", b"new")
    assert (tmp_path / "b" / "a").read_bytes() == b"new"


def test_a_value_that_is_no_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"x": object()})
    assert os.listdir(tmp_path) == []


def test_the_system_refusing_a_write_half_way_keeps_the_old_content(tmp_path):
    """A file size limit makes the kernel accept part of the bytes and refuse the rest, as a full disk does."""
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    script = textwrap.dedent(
        f"""
        import resource
        from attrib_jax.storage.files import StorageError, write_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_bytes({str(path)!r}, bytes(1_000_000))
        except StorageError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"cannot write {path}: File too large" in done.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_mapped_arrays_are_the_stored_ones(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.float16([1.5, -2]),
        "none": np.empty((0, 4), np.int64),
        "scalar": np.float64(3),
        "flags": np.array([True, False]),
    }
    files.write_arrays(path, arrays, {"rows": 2})
    mapped, header = files.map_arrays(path)
    assert header == {"rows": 2}
    assert mapped.keys() == arrays.keys()
    for name, array in arrays.items():
        assert mapped[name].dtype == array.dtype and mapped[name].shape == array.shape
        np.testing.assert_array_equal(mapped[name], array)
    with pytest.raises(ValueError, match="read-only"):
        mapped["x"][0, 0] = 1


def test_mapping_a_damaged_file(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_arrays(path, {"x": np.arange(100, dtype=np.float32)}, {})
    good = path.read_bytes()
    for cut in (0, 4, 8, 50, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(files.DamagedFileError):
            files.map_arrays(path)
    path.write_bytes(b"\xff" * 8 + good[8:])
    with pytest.raises(files.DamagedFileError, match="a header of"):
        files.map_arrays(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(files.DamagedFileError, match="checksum"):
        files.map_arrays(path)
    assert files.map_arrays(path, check=False)[0]["x"].shape == (100,)
    with pytest.raises(FileNotFoundError):
        files.map_arrays(tmp_path / "absent")
