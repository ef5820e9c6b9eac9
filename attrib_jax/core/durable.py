"""Files and folders that are on disk once they have their names: the one way in which this library writes.

Kept by hand because what exists covers less: `atomicwrites` is archived, `tempfile` and `os.replace` alone sync neither
the content nor the folder, and none of them replaces folders.
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"  # what the names of unfinished files start with


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder; they order a rename in their own ways.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` of a folder and everything in it."""
    for item in (*folder.rglob("*"), folder):
        sync(item)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the name `path` only when the block has ended well and its bytes are on disk.

    It is written beside `path` under a name that starts with `PARTIAL`, synced and renamed. If anything fails it is
    removed, and what had the name `path` stays as it was.
    """
    path = Path(path)
    with _errors_named(path):
        descriptor, temporary = tempfile.mkstemp(prefix=PARTIAL, suffix=f"-{path.name}", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # mkstemp creates 0600; a result should be as readable as any other file of the user.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync(path.parent)


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Puts `path` into the errors of a full disk, which name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to make and fill, which takes the name `path` once the block has ended well and its content is on disk.

    What had that name is deleted then, and keeps it if anything fails. `remove_leftovers` deletes what a killed process
    leaves.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = workplace / "new", workplace / "old"
    try:
        with _errors_named(path):
            yield fresh
            sync_all(fresh)
        try:
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(fresh, path)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Deletes what killed processes left of making the new folder `path`; only while nobody makes it."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
