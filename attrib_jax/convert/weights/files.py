"""Weight files of every kind, opened as named tensors that are read one by one; writing streams too.

The kinds: safetensors, PyTorch files (torch_files.py) and the json index of a sharded model of either kind. And which
files a part of a model is in, by their names.
"""

import json
import logging
import math
import os
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.weights.tensors import LazyTensor, Tensor, dtype_of
from attrib_jax.core.durable import new_file

# The type names of safetensors files (https://github.com/huggingface/safetensors, README "Format").
_TYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "C64": np.dtype("<c8"),
    "BF16": dtype_of("bfloat16"),
    "F8_E4M3": dtype_of("float8_e4m3fn"),
    "F8_E4M3FNUZ": dtype_of("float8_e4m3fnuz"),
    "F8_E5M2": dtype_of("float8_e5m2"),
    "F8_E5M2FNUZ": dtype_of("float8_e5m2fnuz"),
}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
_MAX_AXES = 32  # of an array in numpy 1
_LISTED = 20  # names shown in an error message
_LFS_POINTER = b"version https://git-lfs"
# transformers names its PyTorch files otherwise than its safetensors; diffusers does not.
_BIN_STEMS = {"model": "pytorch_model"}
_VARIANT = r"(?P<variant>(?![\w-]*-\d{5}-of-\d{5})[\w-]+)"
_FULL = "full precision"

_log = logging.getLogger(__name__)


def open_weights(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Name -> tensor of a weight file; no tensor is read yet.

    Args:
      path: a safetensors or PyTorch file, told apart by content and not by name, or the `*.index.json` of a sharded
        model, its shards in the same folder. Files stay open as long as one of their tensors is held.

    Raises:
      FileNotFoundError: the file, or a shard, does not exist.
      ValueError: the file is damaged or of another kind, a PyTorch file holds no tensors by name or PyTorch is not
        installed, or an index does not fit its shards.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weight file {path} does not exist")
    if path.endswith(".json"):
        return _open_index(path)
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(_LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    # Byte 8 is the brace of a safetensors header. In a zip it is the compression method, and in a file of PyTorch
    # before 1.6 a part of the magic number.
    if start[8:9] != b"{" and start.startswith((b"PK", b"\x80")):
        from attrib_jax.convert.weights.torch_files import open_torch

        return open_torch(path)[0]
    if start[8:9] == b"{" or path.endswith(".safetensors"):
        return _open_safetensors(path)
    raise ValueError(
        f"{path} is truncated or neither a safetensors nor a PyTorch file (it starts with {start[:16]!r}); copy or "
        "download it again"
    )


class _File:
    """An open file whose parts are read at any time, from any thread."""

    def __init__(self, path: str):
        self.path = path
        self._file = open(path, "rb")
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes at `offset`, uint8; the caller has checked that the file was that long."""
        data = np.empty(nbytes, np.uint8)
        with self._lock:
            self._file.seek(offset)
            count = self._file.readinto(data.data)
        if count != nbytes:
            raise _damaged(self.path, "it has become shorter since it was opened")
        return data


def _damaged(path: str, why: Any) -> ValueError:
    return ValueError(f"{path} is truncated or no safetensors file ({why}); copy or download it again")


class Place(NamedTuple):
    """Where a tensor lies in a safetensors file: its type and shape, and the offset of its first byte."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def _open_safetensors(path: str) -> dict[str, LazyTensor]:
    file = _File(path)
    _, places = _read_header(file)
    return {name: _tensor(file, place) for name, place in places.items()}


def safetensors_layout(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Place]]:
    """The metadata of a safetensors file, and where its tensors lie; nothing else is read.

    Raises ValueError unless the tensors fill the file exactly, one after the other; OSError where it cannot be read.
    """
    return _read_header(_File(os.fspath(path)))


def _read_header(file: _File) -> tuple[dict[str, Any], dict[str, Place]]:
    path = file.path
    if file.size < 8:
        raise _damaged(path, f"it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(_HEADER_LIMIT, file.size - 8):
        raise _damaged(path, f"a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(file.read(8, length).tobytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    places, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        spans.append((begin, end, name))
        places[name] = Place(dtype, shape, start + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _damaged(path, f"tensor {name!r} starts at byte {begin} of the data, expected {position}")
        position = end
    if start + position != file.size:
        raise _damaged(path, f"its tensors end at byte {start + position}, the file at {file.size}")
    return metadata, places


def _check_entry(path: str, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header entry of {name!r} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in _TYPES):
        supported = ", ".join(_TYPES)
        raise ValueError(f"{path}: tensor {name!r} has the type {dtype!r}, which is not supported ({supported})")
    counts = [shape, offsets]
    if not all(isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x) for x in counts):
        raise _damaged(path, f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if len(shape) > _MAX_AXES or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has {len(shape)} axes and {len(offsets)} data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _TYPES[dtype].itemsize:
        raise _damaged(path, f"tensor {name!r} of type {dtype} and shape {shape} has {end - begin} bytes")
    return _TYPES[dtype], tuple(shape), begin, end


def _tensor(file: _File, place: Place) -> LazyTensor:
    dtype, shape, offset = place
    nbytes = math.prod(shape) * dtype.itemsize
    return LazyTensor(shape, dtype, lambda: file.read(offset, nbytes).view(dtype).reshape(shape))


def _open_index(path: str) -> dict[str, LazyTensor]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{path} is no index of a sharded model: it has no "weight_map" of tensor and file names')
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\:\0")
        if not plain or shard.endswith(".json"):
            raise ValueError(f"{path}: the file of {name!r} is {shard!r}, expected the name of a file in its folder")
    folder = os.path.dirname(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if missing:
        raise FileNotFoundError(f"{path} names files that are missing in its folder: {_listed(missing)}")
    opened = {shard: open_weights(os.path.join(folder, shard)) for shard in shards}
    absent = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in opened[shard]]
    if absent:
        raise ValueError(f"{path} names tensors that their files do not hold: {_listed(absent)}")
    return {name: opened[shard][name] for name, shard in weight_map.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def write_weights(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file that PyTorch's loaders accept, one tensor in memory at a time.

    The file takes its name only when it is complete, so it may replace the one that `tensors` come from.

    Args:
      tensors: names and arrays, LazyTensors or both.
      path: the file; its folder exists.
      dtype: dtype of the floating-point tensors in the file; None keeps theirs. Integers are never cast.
      metadata: further entries of the header's metadata.

    Raises:
      ValueError: a tensor holds a NaN or an infinity (after the cast), or has a type that safetensors does not have.
      OSError: the file cannot be written; what `path` held before is still there.
    """
    path = os.fspath(path)
    lazy = {name: _cast(LazyTensor.of(tensor), dtype) for name, tensor in tensors.items()}
    for name, tensor in lazy.items():
        if tensor.dtype not in _TYPE_NAMES or name == "__metadata__":
            raise ValueError(f"tensor {name} of type {tensor.dtype.name} cannot be stored in a safetensors file")
    # Large types first, as safetensors does, so that every tensor starts at a multiple of its item size.
    order = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"cannot write {path}: the folder {folder} does not exist; make it first")
    with new_file(path) as file:
        file.write(_header(lazy, order, metadata or {}))
        for name in order:
            file.write(_finite(name, lazy[name].read()).reshape(-1).view(np.uint8).data)


def _cast(tensor: LazyTensor, dtype: Any) -> LazyTensor:
    if dtype is None or not jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor

    def cast(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused by name
            return array.astype(dtype, copy=False)

    return tensor.map(cast, dtype=dtype)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(array)):
        raise ValueError(f"tensor {name} holds a NaN or an infinity as {array.dtype.name}; it cannot be saved")
    return array


def _header(tensors: dict[str, LazyTensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name in order:
        tensor = tensors[name]
        entries[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def stem_of(part: str) -> str:
    """How the names of a part's weight files start."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_choices(names: Collection[str], stem: str) -> dict[str | None, str]:
    """Variant -> the file of it to open, among the file names of one part's folder; None is full precision.

    A variant is there as safetensors or `.bin`, in one file or as the index of shards; the first of these is taken. The
    names are those of diffusers and transformers, with both places where they have put a variant into an index's name:
    `S.safetensors`, `S.fp16.safetensors`, `S.safetensors.index.json`, `S.safetensors.index.fp16.json`,
    `S.safetensors.fp16.index.json`.

    Args:
      names: file names.
      stem: S in the names: "diffusion_pytorch_model", or "model" for a part of transformers, whose `.bin` files are
        called `pytorch_model`.
    """
    found: dict[str | None, str] = {}
    for start, suffix in ((stem, "safetensors"), (_BIN_STEMS.get(stem, stem), "bin")):
        single = rf"{start}(\.{_VARIANT})?\.{suffix}"
        index = rf"{start}\.{suffix}\.index(\.{_VARIANT})?\.json"
        early_index = rf"{start}\.{suffix}\.{_VARIANT}\.index\.json"
        for pattern in (single, index, early_index):
            for name in sorted(names):
                match = re.fullmatch(pattern, name)
                if match:
                    found.setdefault(match["variant"], name)
    return found


def choose_weights(names: Mapping[str, Collection[str]], variant: str | None, source: str) -> dict[str, str | None]:
    """Part -> the weight file to open (None where the part has none), among the file names of each part's folder.

    With a `variant`, a part that lacks it takes full precision, as in diffusers: `non_ema` is a UNet's alone. Without
    one, a part that has nothing but `fp16` takes that. Either is logged.

    Raises FileNotFoundError where no part has `variant`, or a part has only other variants; lists what is there.
    """
    choices = {part: weight_choices(files, stem_of(part)) for part, files in names.items()}
    if variant is not None and not any(variant in found for found in choices.values()):
        raise FileNotFoundError(f"{source} has no variant {variant!r}; it holds {_describe(choices)}")
    chosen: dict[str, str | None] = {}
    for part, found in choices.items():
        kind = next((kind for kind in (variant, None, "fp16") if kind in found), None)
        if found and kind not in found:
            raise FileNotFoundError(f"{source} has no {_FULL} weights; name a variant. It holds {_describe(choices)}")
        chosen[part] = found.get(kind)
        if found and kind != variant:
            _log.warning("%s: %s weights of %s: %s", source, kind or _FULL, part, found[kind])
    return chosen


def _describe(choices: Mapping[str, Mapping[str | None, str]]) -> str:
    kinds = {part: ", ".join(kind or _FULL for kind in found) or "no weights" for part, found in choices.items()}
    return "; ".join(f"{part}: {text}" for part, text in kinds.items())


def find_weights(folder: str, stem: str, variant: str | None = None) -> str:
    """The path for `open_weights` of the weights in one part's folder.

    Args:
      folder: such as a pipeline's unet/.
      stem: "diffusion_pytorch_model", or "model" (also "pytorch_model") for a part of transformers.
      variant: such as "fp16"; None takes full precision, or `fp16` where nothing else is there, which is logged.

    Raises FileNotFoundError where there are no such weights; lists the variants that are there.
    """
    stem = next((safe for safe, other in _BIN_STEMS.items() if stem == other), stem)
    found = weight_choices(list_files(folder), stem)
    if not found:
        raise FileNotFoundError(
            f"{folder!r} has no weights: expected {stem}.safetensors, {_BIN_STEMS.get(stem, stem)}.bin, a variant such "
            "as fp16, or an index of shards"
        )
    if variant is None and None not in found and "fp16" in found:
        _log.warning("%s: fp16 weights: %s", folder, found["fp16"])
        variant = "fp16"
    if variant not in found:
        held = ", ".join(kind or _FULL for kind in found)
        raise FileNotFoundError(f"{folder!r} has no {variant or _FULL} weights; it holds {held}; name one as variant")
    return os.path.join(folder, found[variant])


def list_files(folder: str) -> list[str]:
    """The names of a folder's files; a link to nothing, as an interrupted download leaves it, is none."""
    if not os.path.isdir(folder):
        return []
    return [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
