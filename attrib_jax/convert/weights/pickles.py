"""Reads the data in a pickle without running it: an interpreter of the few operations that plain data needs.

A pickle is a program. `pickle.Unpickler` calls what the file names, and an allow-list of names still leaves real
objects whose state the file may set. Here nothing that a file names is imported or called: `pickletools` decodes the
operations, names stay strings, and each that numpy and torch write for arrays stands for one function of this module.
What is read is never larger than a few times the file.
"""

import io
import math
import operator
import os
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
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


class _Refused(ValueError):
    """The pickle asks for something that is no data."""


class _Name:
    """A module-level name in the file; what it stands for is never imported."""

    def __init__(self, name: str):
        self.name = name


class _Dtype:
    """A numpy type: the file first names it, then sets its byte order."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Array:
    """An array: the file first makes an empty one, then sets its state."""

    def __init__(self):
        self.array: np.ndarray | None = None


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
        value = _interpret(io.BytesIO(content))
    except _Refused as error:
        raise ValueError(f"{path} is not read: it {error}. Only plain numbers, lists and arrays are.") from error
    # A malformed stream may fail in any way on the interpreter's stack; each is the same to the user.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"{path} is truncated or no pickle ({reason}); copy or make it again") from error
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise ValueError(f"{path} holds no dict with names; expected a pickled dict of arrays")
    for name, item in value.items():
        if isinstance(item, _Array):
            if item.array is None:
                raise ValueError(f"{path} is truncated or damaged: array {name!r} has no content")
            value[name] = item.array
        elif isinstance(item, (_Name, _Dtype, _Storage)):
            raise ValueError(f"{path}: {name!r} is no data")
    return value


def _interpret(stream: io.BytesIO) -> Any:
    """The value of one pickle, which ends where the stream's position is left."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    encoded: dict[str, bytes] = {}

    def pop_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(stream):
        kind = opcode.name
        if kind in _PUSHED:
            stack.append(argument)
        elif kind in _MADE:
            stack.append(_MADE[kind]())
        elif kind in _TUPLES:
            items = tuple(stack[-_TUPLES[kind] :])
            del stack[-_TUPLES[kind] :]
            stack.append(items)
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind == "TUPLE":
            stack.append(tuple(pop_mark()))
        elif kind == "LIST":
            stack.append(pop_mark())
        elif kind == "DICT":
            items = pop_mark()
            stack.append({})
            _set_items(stack[-1], items)
        elif kind in ("APPEND", "APPENDS"):
            items = pop_mark() if kind == "APPENDS" else [stack.pop()]
            _check_type(stack[-1], list).extend(items)
        elif kind in ("SETITEM", "SETITEMS"):
            items = pop_mark() if kind == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], items)
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if kind == "MEMOIZE" else argument] = stack[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif kind == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(_check_type(module, str), _check_type(name, str)))
        elif kind == "REDUCE":
            arguments, name = _check_type(stack.pop(), tuple), _check_type(stack.pop(), _Name).name
            if name != "_codecs.encode":
                stack.append(_REDUCED[name](*arguments))
                continue
            # How older protocols write bytes. One object for each text: a text that is used again and again would
            # otherwise fill the memory from a small file.
            text, encoding = arguments
            if encoding != "latin1":
                raise _Refused(f"encodes text as {str(encoding)[:40]!r}")
            if text not in encoded:
                encoded[text] = _check_type(text, str).encode("latin1")
            stack.append(encoded[text])
        elif kind == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif kind == "BINPERSID":
            stack.append(_Storage(*_check_type(stack.pop(), tuple)))
        elif kind == "STOP":
            if len(stack) != 1:
                raise _Refused("ends with more than one value")
            return stack[0]
        elif kind not in ("PROTO", "FRAME"):
            raise _Refused(f"uses the operation {kind}, which plain data does not need")
    raise EOFError("no end")


def _check_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        if type(key) not in (str, int, bytes):
            raise _Refused(f"has a dict key of type {type(key).__name__}")
        _check_type(target, dict)[key] = value


def _named(module: str, name: str) -> _Name:
    full = f"{module}.{name}"
    # numpy 2 renamed numpy.core; pickles of either are read under either.
    full = re.sub(r"^numpy\.core\.", "numpy._core.", full).replace("__builtin__.", "builtins.", 1)
    if full not in _REDUCED and full not in _STORAGES and full != "numpy.ndarray":
        raise _Refused(f"names {full[:100]!r}, which is no data")
    return _Name(full)


def _set_state(target: Any, state: Any) -> None:
    """What the file's last step makes of a numpy array or type; nothing else has a state that could be set."""
    if isinstance(target, _Array):
        _, shape, dtype, fortran, raw = _check_type(state, tuple)
        target.array = _array(raw, dtype, shape, "F" if fortran else "C")
    elif isinstance(target, _Dtype):
        target.dtype = target.dtype.newbyteorder(_check_type(state, tuple)[1])
    else:
        raise _Refused(f"sets the state of a {type(target).__name__.strip('_').lower()}")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    dtype = _check_type(dtype, _Dtype).dtype
    if not isinstance(raw, (bytes, bytearray)):
        raise _Refused(f"has an array whose content is a {type(raw).__name__}")
    sizes = _sizes(shape)
    if math.prod(sizes) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {sizes} and type {dtype} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(sizes, order=order)


def _sizes(shape: Any) -> tuple[int, ...]:
    sizes = tuple(map(operator.index, _check_type(shape, tuple)))
    if any(size < 0 for size in sizes):
        raise ValueError(f"a negative size in {sizes}")
    return sizes


def _make_dtype(name: Any, *_: Any) -> _Dtype:
    if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", str(name)):
        raise _Refused(f"has an array of type {str(name)[:40]!r}")
    return _Dtype(np.dtype(name))


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if _check_type(kind, _Name).name != "numpy.ndarray":
        raise _Refused(f"makes an array of {kind.name}")
    return _Array()


def _scalar(dtype: Any, raw: Any) -> np.generic:
    return _array(raw, dtype, (), "C")[()]


class _Storage:
    """torch's block of numbers, told of before its content follows."""

    def __init__(self, tag: Any, kind: Any, key: Any, location: Any, count: Any, *_: Any):
        self.dtype = np.dtype(_STORAGES[_check_type(kind, _Name).name])
        self.count = operator.index(count)


def _storage(content: Any) -> np.ndarray:
    """The numbers of a storage as torch pickles it: five pickles, then the count (int64) and the raw values."""
    stream = io.BytesIO(_check_type(content, bytes))
    magic, protocol, system, storage, keys = (_interpret(stream) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or len(_check_type(keys, list)) != 1:
        raise ValueError("a tensor without torch's mark")
    if not _check_type(system, dict).get("little_endian", True):
        raise _Refused("has a tensor of a big-endian machine")
    count = int.from_bytes(stream.read(8), "little")
    start = stream.tell()
    if count != storage.count or len(content) - start != count * storage.dtype.itemsize:
        raise ValueError(f"a tensor of {storage.count} values with {len(content) - start} bytes")
    # A view: the same content may be used again and again.
    return np.frombuffer(content, storage.dtype, offset=start) if count else np.zeros(0, storage.dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    values = _check_type(storage, np.ndarray)
    sizes, strides, first = _sizes(size), _sizes(stride), operator.index(offset)
    last = first + sum((length - 1) * step for length, step in zip(sizes, strides))
    count = math.prod(sizes)
    # A tensor that repeats its values (stride 0) may be far larger than its file.
    if len(sizes) != len(strides) or first < 0 or count > len(values) or (count and last >= len(values)):
        raise ValueError(f"a tensor of shape {sizes} and strides {strides} in {len(values)} values")
    if not count:
        return np.zeros(sizes, values.dtype)
    steps = tuple(step * values.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(values[first:], sizes, steps, writeable=False)


# What numpy (1 and 2) and torch name in the pickles of arrays and tensors, and what is done in its place.
_REDUCED: dict[str, Callable[..., Any] | None] = {
    "numpy.dtype": _make_dtype,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "_codecs.encode": None,
    # Only the empty ones: `bytes(n)` of a large n would be larger than any file.
    "builtins.bytes": lambda: b"",
    "collections.OrderedDict": lambda: {},
}
