"""Files and folders: what a reader finds after each way that writing can fail, and after a power loss."""

import errno
import os
import subprocess
import sys
import tempfile
import textwrap

import pytest

from attrib_jax.core.durable import PARTIAL, new_file, new_folder, remove_leftovers

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads names of descriptors from /proc")


def write_file(path, content, error=None):
    with new_file(path) as file:
        file.write(content.encode())
        if error is not None:
            raise error


def write_folder(path, content, error=None):
    with new_folder(path) as fresh:
        (fresh / "inner").mkdir(parents=True)
        (fresh / "inner" / "a").write_text(content)
        if error is not None:
            raise error


WRITERS = {"file": (write_file, lambda path: path), "folder": (write_folder, lambda path: path / "inner" / "a")}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("failing", ["mkstemp", "mkdtemp", "fsync", "replace", "rename", KeyError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_content_and_leaves_nothing_else(tmp_path, monkeypatch, kind, failing):
    write, content = WRITERS[kind]
    write(tmp_path / "x", "first")
    write(tmp_path / "x", "second")
    assert content(tmp_path / "x").read_text() == "second"

    def fail(*args, **kwargs):
        if failing != "rename" or os.path.basename(args[0]) == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(*args)

    rename = os.rename
    reached = failing not in {"file": ("mkdtemp", "rename"), "folder": ("mkstemp", "replace")}[kind]
    if isinstance(failing, str):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile if failing in ("mkstemp", "mkdtemp") else os, failing, fail)
            if reached:
                with pytest.raises(OSError, match="No space left"):
                    write(tmp_path / "x", "third")
    else:
        with pytest.raises(failing):
            write(tmp_path / "x", "third", failing())
    assert content(tmp_path / "x").read_text() == "second"
    assert os.listdir(tmp_path) == ["x"]


@needs_proc
@pytest.mark.parametrize("kind", WRITERS)
def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch, kind):
    calls = []
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
    for name, original in originals.items():

        def called(*args, name=name, original=original):
            file = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            calls.append((name, os.path.basename(file)))
            original(*args)

        monkeypatch.setattr(os, name, called)
    WRITERS[kind][0](tmp_path / "x", "new")
    monkeypatch.undo()
    *before, rename, parent = calls
    assert rename == ({"file": "replace", "folder": "rename"}[kind], "x") and parent == ("fsync", tmp_path.name)
    assert {name for name, _ in before} == {"fsync"}
    synced = {file for _, file in before}
    assert synced == {"new", "inner", "a"} if kind == "folder" else all(file.endswith("-x") for file in synced)


def test_the_system_refusing_a_write_half_way_keeps_the_old_content(tmp_path):
    """A file size limit makes the kernel accept part of the bytes and refuse the rest, as a full disk does."""
    write_file(tmp_path / "x", "old")
    script = f"""
        import resource
        from attrib_jax.core.durable import new_file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with new_file({str(tmp_path / "x")!r}) as file:
            file.write(bytes(1_000_000))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@needs_proc
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(tmp_path, monkeypatch, kind):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write, content = WRITERS[kind]
    write(tmp_path / "x", "new")
    assert content(tmp_path / "x").read_text() == "new"


def test_files_are_as_readable_as_others_and_unfinished_ones_are_marked(tmp_path):
    with new_file(tmp_path / "x") as file:
        (unfinished,) = os.listdir(tmp_path)
        assert unfinished.startswith(PARTIAL)
        file.write(b"x")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_leftovers_of_a_killed_process_are_those_of_the_folder_alone(tmp_path):
    write_folder(tmp_path / "model", "kept")
    for name in (".model.k2x", ".models.k2x"):
        (tmp_path / name / "new").mkdir(parents=True)
    remove_leftovers(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == [".models.k2x", "model"]
