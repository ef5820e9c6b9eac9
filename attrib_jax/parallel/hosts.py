"""Several hosts in lockstep: which one writes, which one decides, and how the others learn the result.

Every host runs the same program. Host 0 alone writes to the workdir and takes the decisions that read it, so that hosts
never disagree on what is stored; an error there is raised on every host, so that none waits for one that gave up. With
one host, everything here is a plain call.
"""

import contextlib
import contextvars
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

_ARRAYS, _ARRAY, _JSON, _ERROR = range(4)
# Bytes of every first message. Messages have few sizes, because each one compiles a program.
_SHORT = 2048
_LENGTH = 8
# Inside `run_on_host0` host 0 is alone, whatever it calls: the others wait for its result.
_alone = contextvars.ContextVar("alone", default=False)


def host_index() -> int:
    """Index of this host, 0 for the one that writes."""
    return jax.process_index()


def num_hosts() -> int:
    """Number of hosts (processes) in the run."""
    return jax.process_count()


def is_host0() -> bool:
    """Whether this host is the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every host has reached this call."""
    if not _by_itself():
        multihost_utils.sync_global_devices(name)


def warm_up_collectives() -> None:
    """Connects the hosts' devices to each other; call it once, at the start.

    Collectives of CPUs wait 30 seconds for each other when they first connect, and without limit afterwards; a host may
    read a model for minutes longer than another.
    """
    if jax.process_count() == 1:
        return
    barrier("warm_up_collectives")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    sharding = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    fetch(jax.make_array_from_process_local_data(sharding, np.zeros(jax.local_device_count(), np.float32)))


def fetch(array: Any) -> np.ndarray:
    """The values of a global array, whose shards may be on several hosts, as one numpy array on every host."""
    if jax.process_count() == 1 or getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def on_host_memory() -> contextlib.AbstractContextManager:
    """A context in which new arrays lie in this host's memory, and not on its accelerators.

    They move to a device when a program there takes them. Raises RuntimeError where JAX is kept from the CPU.
    """
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def run_on_host0(fn: Callable[[], T]) -> T:
    """Runs `fn` on host 0 alone and returns its result on every host.

    Args:
      fn: function without arguments that returns JSON values, a numpy array, or a dict of numpy arrays (dtypes that
        numpy knows by itself). It may call anything of this module: host 0 then acts as the only host.

    Raises:
      What `fn` raised, on every host.
    """
    if _by_itself():
        return fn()
    error, content = None, b""
    if is_host0():
        token = _alone.set(True)
        try:
            content = _encode(fn())
        except Exception as raised:
            error, content = raised, _encode_error(raised)
        finally:
            _alone.reset(token)
    content = _broadcast(content)
    if error is not None:
        raise error
    return _decode(content)


def host0_first(fn: Callable[[], T]) -> T:
    """Runs `fn` on host 0 and, when it has returned there, on the others: to open a store and create it if absent.

    Returns each host's own result. Raises what `fn` raised on host 0, on every host.
    """
    if _by_itself():
        return fn()
    results = []
    run_on_host0(lambda: results.append(fn()))
    return results[0] if results else fn()


@contextlib.contextmanager
def independent_hosts() -> Iterator[None]:
    """A context in which hosts do different work, with no calls to each other; at its end every host waits for all.

    What one of them raised is then raised on every host, so that none waits for ever.
    """
    if _by_itself():
        yield
        return
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    content = b"" if error is None else _encode_error(error)[:_SHORT]
    contents = multihost_utils.process_allgather(_padded(content, _SHORT))
    if error is not None:
        raise error
    for host, row in enumerate(np.asarray(contents).reshape(num_hosts(), -1)):
        content = row.astype(np.uint8).tobytes().rstrip(b"\0")
        if content:
            raise _same_kind(*_error_parts(content), prefix=f"host {host}: ")


def _by_itself() -> bool:
    return jax.process_count() == 1 or _alone.get()


def _broadcast(content: bytes) -> bytes:
    """Host 0's bytes, on every host."""
    message = len(content).to_bytes(_LENGTH, "little") + content
    received = _broadcast_padded(message[:_SHORT], _SHORT)
    length = int.from_bytes(received[:_LENGTH], "little") + _LENGTH
    if length > _SHORT:
        received += _broadcast_padded(message[_SHORT:], 1 << (length - _SHORT - 1).bit_length())
    return received[_LENGTH:length]


def _broadcast_padded(content: bytes, size: int) -> bytes:
    received = multihost_utils.broadcast_one_to_all(_padded(content if is_host0() else b"", size))
    return np.asarray(received).astype(np.uint8).tobytes()


def _padded(content: bytes, size: int) -> np.ndarray:
    buffer = np.zeros(size, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    return buffer


def _encode(value: Any) -> bytes:
    if isinstance(value, np.ndarray) or (
        isinstance(value, dict) and any(isinstance(v, np.ndarray) for v in value.values())
    ):
        stream = io.BytesIO()
        single = isinstance(value, np.ndarray)
        arrays: Any = {"value": value} if single else value
        np.savez(stream, **arrays)
        return bytes([_ARRAY if single else _ARRAYS]) + stream.getvalue()
    return bytes([_JSON]) + json.dumps(value).encode()


def _decode(content: bytes) -> Any:
    kind, rest = content[0], content[1:]
    if kind == _JSON:
        return json.loads(rest)
    if kind == _ERROR:
        raise _same_kind(*_error_parts(content))
    with np.load(io.BytesIO(rest), allow_pickle=False) as stored:
        return stored["value"] if kind == _ARRAY else {name: stored[name] for name in stored.files}


def _encode_error(error: Exception) -> bytes:
    # Lines and not JSON, so that a long message can be cut anywhere; file names may hold what UTF-8 has no bytes for.
    text = f"{type(error).__module__}\n{type(error).__qualname__}\n{error}"
    return bytes([_ERROR]) + text.encode(errors="backslashreplace")


def _error_parts(content: bytes) -> tuple[str, str, str]:
    module, name, message = content[1:].decode(errors="ignore").split("\n", 2)
    return module, name, message


def _same_kind(module: str, name: str, message: str, prefix: str = "") -> Exception:
    """An error of the class that another host raised; a RuntimeError where that class takes no message."""
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):
            return kind(prefix + message)
    return RuntimeError(f"{prefix}{name}: {message}")
