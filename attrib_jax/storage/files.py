"""Files of stages: written atomically (core/durable.py), with checksums, and with errors that name path and remedy.

The checksum is kept by hand, because safetensors has none.
"""

import contextlib
import json
import logging
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from attrib_jax.convert.weights.files import safetensors_layout
from attrib_jax.core.durable import PARTIAL, new_file, sync

_log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """A file could not be written, read or trusted; the message names the path, the reason and the remedy."""


class DamagedFileError(StorageError):
    """A file is truncated, or its content does not match its checksum."""


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike, doing: str = "write") -> Iterator[None]:
    """Turns an OSError of the block (full disk, read-only folder, no permission) into a StorageError naming `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot {doing} {path}: {reason}. What was stored before is unchanged; make room or choose a writable "
            "folder, then start the same command again to resume."
        ) from error


def make_folder(path: str | os.PathLike) -> Path:
    """Creates the folder and its parents if absent, and returns it as a Path."""
    path = Path(path)
    with storage_errors(path, "create the folder"):
        created = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        # Else a power loss could take the folder with all that was stored in it since.
        for folder in reversed(created):
            sync(folder.parent)
    return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`core.durable.new_file`, whose OSErrors are raised as StorageError."""
    with storage_errors(path), new_file(path) as file:
        yield file


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Deletes the temporary files that a killed writer left in `folder` and below; only while nobody writes there."""
    for leftover in Path(folder).rglob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Replaces `path` atomically with `content`."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replaces `path` atomically with `value` as indented JSON; a value that is not valid JSON writes nothing."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Replaces `path` atomically with an uncompressed npz of `arrays`, readable with `numpy.load`."""
    with atomic_write(path) as file:
        np.savez(file, **dict[str, Any](arrays))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], header: Any) -> None:
    """Replaces `path` atomically with a safetensors file of `arrays` that carries `header` (JSON) and a checksum."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    foreign = {name: str(array.dtype) for name, array in arrays.items() if array.dtype.kind not in "biufc"}
    if foreign:
        raise ValueError(f"arrays for {path} have dtypes that cannot be stored: {foreign}. Cast them to float32 first.")
    encoded = json.dumps(header, sort_keys=True, allow_nan=False)
    metadata = {"header": encoded, "crc32": str(_checksum(arrays, encoded))}
    content = safetensors.numpy.save(arrays, metadata=metadata)
    write_bytes(path, content)


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the header that `write_arrays` stored.

    Raises DamagedFileError where the file is truncated or any array, name, shape, dtype or header value has changed,
    FileNotFoundError where there is none, StorageError where it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}. Check its permissions and the disk."
        ) from error
    try:
        arrays = safetensors.numpy.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        encoded, checksum = metadata["header"], int(metadata["crc32"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedFileError(f"{path} is truncated or damaged ({error})") from error
    if _checksum(arrays, encoded) != checksum:
        raise DamagedFileError(f"{path} is damaged: its content does not match its checksum")
    return arrays, json.loads(encoded)


def stored_arrays(path: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """The arrays that `write_arrays` stored; None where they have to be computed, with a warning for a damaged file.

    Raises StorageError where the file cannot be read.
    """
    try:
        return read_arrays(path)[0]
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
        return None


def map_arrays(path: str | os.PathLike, check: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `read_arrays`, the arrays as read-only memory maps: their pages are read when used, and can go again.

    `check` compares the content with its checksum first, through the maps. Raises as `read_arrays`.
    """
    try:
        metadata, places = safetensors_layout(path)
        encoded, checksum = metadata["header"], int(metadata["crc32"])
        arrays = {
            # An empty map cannot be made.
            name: np.memmap(path, dtype, "r", offset, shape) if math.prod(shape) else np.empty(shape, dtype)
            for name, (dtype, shape, offset) in places.items()
        }
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}. Check its permissions and the disk."
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedFileError(f"{path} is truncated or damaged ({error})") from error
    if check and _checksum(arrays, encoded) != checksum:
        raise DamagedFileError(f"{path} is damaged: its content does not match its checksum")
    return arrays, json.loads(encoded)


def _checksum(arrays: Mapping[str, np.ndarray], header: str) -> int:
    """crc32 of all that `read_arrays` returns: the header, and each array's name, dtype, shape and bytes."""
    value = zlib.crc32(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        # A flat byte view: zlib refuses zero-sized and multi-dimensional views of some dtypes.
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return value
