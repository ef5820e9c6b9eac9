"""Fingerprints of arrays: what a stage compares to know that it was made from the same inputs."""

import hashlib
from typing import Any

import jax
import numpy as np


def params_fingerprint(params: Any) -> str:
    """SHA-256 (64 hex digits) over the sorted names, shapes, dtypes and little-endian bytes of a pytree of arrays.

    It depends on neither the device, the sharding nor the order of the keys. Leaves are hashed one at a time.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for name, leaf in sorted(((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda item: item[0]):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()
