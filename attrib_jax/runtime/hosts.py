"""Several hosts in lockstep: who writes, who decides, and how all learn of it.

Every host runs the same program. Host 0 alone writes to the workdir and takes the decisions that read it, so that hosts
never disagree on what is stored; an error there is raised on every host, so that none waits for one that gave up. With
one host, everything here is a plain call.
"""

import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from attrib_jax.runtime.files import DamagedFileError, StorageError

T = TypeVar("T")

# What host 0 may raise inside `from_first_host` and the others raise again; any other class becomes a RuntimeError.
_ERRORS = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, OSError, StorageError, DamagedFileError)}
_ARRAYS, _ARRAY, _JSON, _ERROR = range(4)


def host_index() -> int:
    """This host's number, 0 for the one that writes."""
    return jax.process_index()


def num_hosts() -> int:
    """Hosts (processes) in the run."""
    return jax.process_count()


def is_first_host() -> bool:
    """Whether this host is the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(array: Any) -> np.ndarray:
    """A global array, which may lie on several hosts, whole on every host."""
    if jax.process_count() == 1 or getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_first_host(fn: Callable[[], T]) -> T:
    """Runs `fn` on host 0 alone and returns its result on every host.

    Args:
      fn: returns JSON values, a numpy array, or a dict of numpy arrays (dtypes that numpy knows by itself).

    Raises:
      What `fn` raised, on every host.
    """
    if jax.process_count() == 1:
        return fn()
    error, content = None, b""
    if is_first_host():
        try:
            content = _encode(fn())
        except Exception as raised:
            error = raised
            content = bytes([_ERROR]) + json.dumps([type(raised).__name__, str(raised)]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(content)).astype(np.int32)))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
    if error is not None:
        raise error
    return _decode(content)


def _encode(value: Any) -> bytes:
    if isinstance(value, np.ndarray) or (
        isinstance(value, dict) and any(isinstance(v, np.ndarray) for v in value.values())
    ):
        stream = io.BytesIO()
        single = isinstance(value, np.ndarray)
        np.savez(stream, **({"value": value} if single else value))
        return bytes([_ARRAY if single else _ARRAYS]) + stream.getvalue()
    return bytes([_JSON]) + json.dumps(value).encode()


def _decode(content: bytes) -> Any:
    kind, content = content[0], content[1:]
    if kind == _JSON:
        return json.loads(content)
    if kind == _ERROR:
        name, message = json.loads(content)
        raise _ERRORS.get(name, RuntimeError)(message)
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return stored["value"] if kind == _ARRAY else {name: stored[name] for name in stored.files}
