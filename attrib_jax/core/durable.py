"""Files and folders that are on disk once they have their names."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    """`sync` of a folder and all that it holds."""
    for item in (*folder.rglob("*"), folder):
        sync(item)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to make and fill, which takes the name `path` once the block has ended well and its content is on disk.

    What had that name is deleted then, and keeps it if anything fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = workplace / "new", workplace / "old"
    try:
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
