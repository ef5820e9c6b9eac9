"""Fingerprints of settings, files and arrays: what a stage compares to know that it was made from the same inputs."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def digest(content: str | bytes | Iterable[str | bytes | np.ndarray]) -> str:
    """SHA-256 (64 hex digits) of a text in UTF-8, of bytes, or of several parts one after the other.

    Arrays count with their bytes alone, in C order; parts are hashed one at a time, so they may come from a generator.
    """
    total = hashlib.sha256()
    for part in [content] if isinstance(content, str | bytes) else content:
        if isinstance(part, np.ndarray):
            total.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON value, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True))


def file_digest(file: str | os.PathLike) -> str:
    """SHA-256 (64 hex digits) of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def files_digest(files: Iterable[str | os.PathLike]) -> str:
    """SHA-256 (64 hex digits) of the names, without folders, and contents of files, in the order given."""
    return digest(f"{Path(file).name} {file_digest(file)}\n" for file in files)


def array_digest(array: Any) -> str:
    """SHA-256 (64 hex digits) of an array's shape, dtype and little-endian bytes."""
    return params_fingerprint(np.asarray(array))


def params_fingerprint(params: Any) -> str:
    """SHA-256 (64 hex digits) over the sorted names, shapes, dtypes and little-endian bytes of a pytree of arrays.

    It depends on neither the device, the sharding nor the order of the keys. Leaves are hashed one at a time.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]

    def parts():
        for name, leaf in sorted(leaves, key=lambda item: item[0]):
            array = np.asarray(leaf)
            yield f"{name} {array.shape} {array.dtype.name}\n"
            yield array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array

    return digest(parts())


def name_hash(name: str) -> int:
    """First 32 bits of a name's SHA-256, to be folded into a random key."""
    return int(digest(name)[:8], 16)
