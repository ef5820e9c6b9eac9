"""Pickles of plain data: an `Unpickler` that knows the names with which numpy and torch write arrays, and no others.

Each of these names stands for a function of this module; nothing that a file names is imported. What is read is never
larger than a few times the file.
"""

import io
import math
import operator
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

# torch's storage classes as numpy types.
_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C


class _Refused(ValueError):
    """The pickle asks for something that is no data."""


def read_pickled_dict(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a pickled dict of numbers, strings, lists, numpy arrays and torch tensors; runs no code of the file.

    Returns:
      Its items; numpy arrays and torch tensors (contiguous or not, of any device) as numpy arrays of their own type.
      Needs no PyTorch.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or no pickle, holds something else than a dict with names, or asks for
        anything but plain data (object arrays included); says what.
    """
    content = Path(path).read_bytes()
    try:
        value = _load(io.BytesIO(content), len(content))
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise _Refused("holds no dict with names")
        for name, item in value.items():
            if isinstance(item, _Array):
                value[name] = item.read()
            elif isinstance(item, (_Name, _Dtype, _Storage)):
                raise _Refused(f"has {name!r}, which is no data")
    except _Refused as error:
        raise ValueError(f"{path} is not read: it {error}. Expected a pickled dict of numbers and arrays") from error
    # A malformed stream may fail in any way on the unpickler's stack; each is the same to the user.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"{path} is truncated or no pickle ({reason}); copy or make it again") from error
    return value


def _load(stream: io.BytesIO, size: int) -> Any:
    """The value of the pickle at the stream's position, which is left at its end."""
    start = stream.tell()
    # The lengths in the file are checked against it, and the C unpickler's table has as many places as the largest key.
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name.endswith("PUT") and int(argument) > size:
            raise pickle.UnpicklingError(f"a memo of {argument} entries in {size} bytes")
    end = stream.tell()
    stream.seek(start)
    value = _Unpickler(stream).load()
    stream.seek(end)
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self._encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> "_Name":
        full = f"{module}.{name}"
        # numpy 2 renamed numpy.core; pickles of either are read under either.
        full = re.sub(r"^numpy\.core\.", "numpy._core.", full).replace("__builtin__.", "builtins.", 1)
        if full == "_codecs.encode":
            return _Name(full, self._encode)
        if full not in _CALLED and full not in _STORAGES and full != "numpy.ndarray":
            raise _Refused(f"names {full[:100]!r}, which is no data")
        return _Name(full, _CALLED.get(full))

    def persistent_load(self, pid: Any) -> "_Storage":
        return _Storage(*pid)

    def _encode(self, text: str, encoding: str) -> bytes:
        """How older protocols write bytes."""
        if encoding != "latin1":
            raise _Refused(f"encodes text as {str(encoding)[:40]!r}")
        # One object for each text: a text that is used many times would fill the memory from a small file.
        if text not in self._encoded:
            self._encoded[text] = text.encode("latin1")
        return self._encoded[text]


class _Name:
    """What a name in the file becomes: a call of a function of this module, or a mark. It takes no state."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable[..., Any] | None):
        self.name, self._function = name, function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise _Refused(f"calls {self.name!r}")
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"sets the state of {self.name!r}")


class _Dtype:
    """A numpy type: the file first names it, then sets its byte order."""

    def __init__(self, name: Any, *_: Any):
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", str(name)):
            raise _Refused(f"has an array of type {str(name)[:40]!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array: the file first makes an empty one, then sets its state."""

    def __init__(self, array: np.ndarray | None = None):
        self._array = array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self._array = _array(raw, dtype, shape, "F" if fortran else "C")

    def read(self) -> np.ndarray:
        if self._array is None:
            raise EOFError("an array without content")
        return self._array


def _array(raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
        raise _Refused(f"has an array whose content is a {type(raw).__name__}")
    sizes = _sizes(shape)
    if math.prod(sizes) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {sizes} and type {dtype.dtype} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype.dtype).reshape(sizes, order=order)


def _sizes(shape: Any) -> tuple[int, ...]:
    sizes = tuple(map(operator.index, shape))
    if any(size < 0 for size in sizes):
        raise ValueError(f"a negative size in {sizes}")
    return sizes


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if not isinstance(kind, _Name) or kind.name != "numpy.ndarray":
        raise _Refused("makes an array of another class than numpy's")
    return _Array()


class _Storage:
    """torch's block of numbers, told of before its content follows."""

    def __init__(self, tag: Any, kind: Any, key: Any, location: Any, count: Any, *_: Any):
        self.dtype = np.dtype(_STORAGES[kind.name])
        self.count = operator.index(count)


def _storage(content: bytes) -> _Array:
    """The numbers of a storage as torch pickles it: five pickles, then the count (int64) and the raw values."""
    stream = io.BytesIO(content)
    magic, _, system, storage, keys = (_load(stream, len(content)) for _ in range(5))
    if magic != _TORCH_MAGIC or len(keys) != 1 or not system.get("little_endian", True):
        raise ValueError("a tensor without torch's mark, or of a big-endian machine")
    count = int.from_bytes(stream.read(8), "little")
    start = stream.tell()
    if count != storage.count or len(content) - start != count * storage.dtype.itemsize:
        raise ValueError(f"a tensor of {storage.count} values with {len(content) - start} bytes")
    return _Array(np.frombuffer(content, storage.dtype, offset=start) if count else np.zeros(0, storage.dtype))


def _tensor(storage: _Array, offset: Any, size: Any, stride: Any, *_: Any) -> _Array:
    values = storage.read()
    sizes, strides, first = _sizes(size), _sizes(stride), operator.index(offset)
    last = first + sum((length - 1) * step for length, step in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    # A tensor that repeats its values (stride 0) may be far larger than its file.
    if first < 0 or count > len(values) or (count and last >= len(values)):
        raise ValueError(f"a tensor of shape {sizes} and strides {strides} in {len(values)} values")
    if not count:
        return _Array(np.zeros(sizes, values.dtype))
    steps = tuple(step * values.itemsize for step in strides)
    return _Array(np.lib.stride_tricks.as_strided(values[first:], sizes, steps, writeable=False))


# What numpy (1 and 2) and torch name in the pickles of arrays and tensors, and what is called in its place.
_CALLED: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": lambda dtype, raw: _array(raw, dtype, (), "C")[()],
    "numpy._core.numeric._frombuffer": lambda *parts: _Array(_array(*parts)),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    # Only the empty ones: `bytes(n)` of a large n would be larger than any file.
    "builtins.bytes": lambda: b"",
    "collections.OrderedDict": lambda: {},
}
