"""What the readers and writers of small adapter files share: Custom Diffusion weights, learnt tokens, LoRA."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.convert.weights.torch_files import open_torch
from attrib_jax.core.durable import new_file


def open_adapter(path: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Opens a safetensors or PyTorch file, told apart by content.

    Returns:
      Name -> tensor, names of nested dicts joined by dots, and a PyTorch file's plain numbers and strings.

    Raises FileNotFoundError and ValueError as `open_weights`.
    """
    if os.path.isfile(path) and not is_safetensors(path):
        with open(path, "rb") as file:
            if file.read(2).startswith((b"PK", b"\x80")):
                return open_torch(path)
    return open_weights(path), {}


def is_safetensors(path: str) -> bool:
    """Whether a file has the brace of a safetensors header where it belongs, behind an eight-byte length."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_floats(tensor: LazyTensor, path: str, name: str) -> np.ndarray:
    """The numbers of a tensor as float32, or float64 where they are stored so.

    Raises ValueError, naming file and tensor, unless they are finite floating-point numbers within float32's range.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} has the type {tensor.dtype.name}; expected floating-point numbers")
    array = tensor.read()
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    check_finite_as(array, np.float32, path, name)
    return array


def check_finite_as(array: np.ndarray, dtype: Any, path: str, name: str) -> None:
    """Raises ValueError if a number is not finite, or would not be as `dtype`."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(dtype)).all()
    if not finite:
        raise ValueError(f"{path}: {name} holds a NaN or an infinity (as {np.dtype(dtype).name}); load another copy")


def write_adapter(content: Mapping[str, Any], path: str) -> None:
    """Writes arrays and empty dicts by name: as safetensors where `path` ends so, otherwise with `torch.save`.

    A safetensors file holds tensors only, so there an empty dict becomes a tensor without elements: diffusers asks for
    `len(value) == 0` and reads both alike. The file takes its name only when it is complete.
    """
    if path.endswith(".safetensors"):
        write_weights({name: x if len(x) else np.zeros(0, np.float32) for name, x in content.items()}, path)
        return
    import torch

    # Copied, because torch warns about read-only memory, which is what JAX arrays lend.
    state = {name: torch.from_numpy(np.array(x)) if len(x) else {} for name, x in content.items()}
    buffer = io.BytesIO()  # to a file, torch reports a full disk as an error of its own
    torch.save(state, buffer)
    with new_file(path) as file:
        file.write(buffer.getbuffer())


def pick_file(path: str, names: Sequence[str]) -> str:
    """`path` itself, or where it is a folder the one file in it that has one of the `names`.

    Raises:
      FileNotFoundError: the folder holds none of them.
      ValueError: it holds several.
    """
    if not os.path.isdir(path):
        return path
    found = [name for name in names if os.path.isfile(os.path.join(path, name))]
    if not found:
        raise FileNotFoundError(f"folder {path} holds none of: {', '.join(names)}")
    if len(found) > 1:
        raise ValueError(f"folder {path} holds {' and '.join(found)}; give the path of the one to use")
    return os.path.join(path, found[0])
