"""Files of a diagonal Fisher information: our own, and dicts by PyTorch names as published code writes them."""

import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.names import from_torch, name_table, to_torch, torch_axes, torch_name, torch_shape
from attrib_jax.convert.weights.tensors import LazyTensor, Tensor
from attrib_jax.core.checks import check_choice
from attrib_jax.core.weights import flatten_names, subset_patterns
from attrib_jax.curvature.diagonal import GRADIENT_SCALE, Diagonal
from attrib_jax.storage.files import atomic_write, read_arrays

_log = logging.getLogger(__name__)

# Name of the file in the folder of a stage.
FISHER_FILE = "fisher.safetensors"
FISHER_SUFFIXES = (".safetensors", ".pt")


def fisher_file(path: str | os.PathLike) -> Path:
    """The file of an F given as a file or as the folder of its stage; FileNotFoundError if there is none."""
    path = Path(path)
    file = path / FISHER_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"fisher {os.fspath(path)!r} is neither a Fisher file nor a folder with {FISHER_FILE}")
    return file


def read_fisher_file(path: str | os.PathLike, selected: Any = None) -> dict[str, Tensor]:
    """Opens the Fisher information in a file: one of ours, a safetensors or a PyTorch file (`fisher_info.pt`).

    The tensors of foreign files are read one at a time, when they are used, and are checked then. Of a file that
    covers more than the selected weights (`sd_fisher.pt` covers a whole UNet), only those of the same subset are given:
    a subset that is not the model's shows as missing or unexpected names.

    Args:
      path: the file.
      selected: the selected weights, whose names the tensors take; None leaves every tensor under its own name.

    Returns:
      Name -> F in Flax layout, the name joined by '/'. A foreign tensor whose name `selected` does not have, or every
      one if `selected` is None, keeps its PyTorch name and layout.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a foreign file is damaged or holds a tensor that is no float, or (when it is read) a tensor with a
        negative, NaN or infinite value; the tensor is named.
      DamagedFileError: our own file, or a safetensors file whose kind cannot be told, is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Fisher file {os.fspath(path)!r} does not exist")
    table = {} if selected is None else name_table(selected)
    flat: dict[str, Tensor]
    if _is_foreign(path):
        flat = {table.get(name, name): _foreign(path, name, x, table) for name, x in open_weights(path).items()}
    else:
        flat = dict(read_arrays(path)[0])
    if selected is None:
        return flat
    pattern = _subset_pattern(selected)
    taken = {name: x for name, x in flat.items() if pattern.fullmatch(_flax_like(name))}
    return taken or flat


def write_fisher(fisher: Diagonal | Mapping[str, Tensor], path: str | os.PathLike) -> int:
    """Writes F as a dict of float64 tensors by PyTorch parameter names, the form of published Fisher files.

    Float64 because F is often below what float32 holds; a `Diagonal` is read back to the bit. The file takes its name
    only when it is complete. A safetensors file is written one tensor at a time, a PyTorch file from memory.

    Args:
      fisher: a `Diagonal`, or what `read_fisher_file` gives.
      path: the file; `.safetensors`, or `.pt`, which needs PyTorch.

    Returns:
      The number of tensors.

    Raises:
      ValueError: the file name ends otherwise, PyTorch is not installed, or a value is no finite F >= 0.
      StorageError, OSError: the file cannot be written.
    """
    path = Path(path)
    check_choice("Fisher file type", path.suffix, FISHER_SUFFIXES)
    flat = fisher.to_flat() if isinstance(fisher, Diagonal) else fisher
    tensors = {torch_name(name): _to_torch(name, LazyTensor.of(x)) for name, x in flat.items()}
    if path.suffix == ".safetensors":
        write_weights(tensors, path)
        return len(tensors)
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"writing {path} needs PyTorch: pip install torch, or name a .safetensors file") from error
    content = {name: torch.from_numpy(x.read()) for name, x in tensors.items()}
    buffer = io.BytesIO()  # to a file, torch reports a full disk as an error of its own
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    return len(tensors)


def _is_foreign(path: Path) -> bool:
    """Whether a file is not one that `write_arrays` made; what cannot be told is left to its reader to refuse."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] != b"{":
        return path.suffix == ".json" or start.startswith((b"PK", b"\x80"))
    try:
        with safe_open(path, framework="numpy") as file:
            return "crc32" not in (file.metadata() or {})
    except SafetensorError:
        return False


def _foreign(path: Path, name: str, tensor: LazyTensor, table: Mapping[str, str]) -> LazyTensor:
    """A tensor of a file by PyTorch names, as float64, in Flax layout if `table` has its name; checked when read."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{path}: tensor {name} has type {tensor.dtype}; expected floats, the mean squared gradients")
    flax_path = table.get(name, "")
    axes = np.argsort(torch_axes(flax_path, tensor.ndim))
    least = float(np.finfo(jnp.result_type(float)).tiny) / GRADIENT_SCALE**2

    def read(array: np.ndarray) -> np.ndarray:
        values = from_torch(flax_path, array.astype(np.float64))
        _check_values(f"tensor {name}", values)
        lost = np.count_nonzero((values > 0) & (values < least))
        if lost and flax_path:
            _log.warning(
                "%s: %d of %d values of %s are below %.1e and count as 0", path, lost, values.size, name, least
            )
        return values

    return tensor.map(read, tuple(tensor.shape[axis] for axis in axes), np.float64)


def _to_torch(name: str, tensor: LazyTensor) -> LazyTensor:
    def read(array: np.ndarray) -> np.ndarray:
        values = to_torch(name, array.astype(np.float64))
        _check_values(f"Fisher information of {name}", values)
        return values

    return tensor.map(read, torch_shape(name, tensor.shape), np.float64)


def _check_values(name: str, values: np.ndarray) -> None:
    # Written so that a NaN counts.
    bad = values.size - np.count_nonzero((values >= 0) & (values < np.inf))
    if bad:
        raise ValueError(
            f"{name} has {bad} of {values.size} values that are negative, NaN or infinite; a mean of squared gradients "
            "has none: copy the file again, or fit it again"
        )


def _subset_pattern(selected: Any) -> re.Pattern:
    """The narrowest weight subset that holds all names of `selected`."""
    names = list(flatten_names(selected))
    return next(pattern for pattern in subset_patterns(names).values() if all(map(pattern.fullmatch, names)))


def _flax_like(name: str) -> str:
    """A PyTorch name in the form that the patterns of weight subsets match; a Flax name as it is."""
    return re.sub(r"/weight$", "/kernel", name.replace(".", "/"))
