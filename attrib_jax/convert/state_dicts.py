"""Safetensors files <-> parameter trees, checked leaf by leaf; needs no PyTorch."""

import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from attrib_jax.convert.names import from_torch, name_table, to_torch, torch_name, torch_shape

_LISTED = 20  # names shown of each kind of mismatch


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Name -> array in the file's own dtype (bfloat16 included).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or no safetensors file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weight file {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy or download it again") from error


def abstract_params(module: Any, *inputs: Any) -> Any:
    """The parameter tree of a Flax module as `jax.ShapeDtypeStruct`s; `inputs` are what its `__call__` takes."""
    return jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), *inputs)["params"]


def load_params(
    state_dict: Mapping[str, np.ndarray], abstract: Any, dtype: Any = jnp.float32, source: str = "state dict"
) -> Any:
    """A PyTorch state dict as the nested dict of arrays that a Flax module takes.

    Args:
      state_dict: PyTorch names and arrays.
      abstract: the wanted tree, from `abstract_params`.
      dtype: of the returned arrays, whatever the file holds.
      source: what the error messages call the state dict, usually its file.

    Raises:
      ValueError: tensors are missing, unexpected or misshaped (all are listed), one holds a NaN or an infinity after
        the cast to `dtype`, or `dtype` is float64 while JAX has 64-bit types switched off.
    """
    if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
        raise ValueError(f"dtype={jnp.dtype(dtype).name} needs 64-bit types: set jax_enable_x64, or load as float32")
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(abstract, sep="/").items()}
    table = name_table(abstract)
    _check_names(state_dict, {name: torch_shape(path, shapes[path]) for name, path in table.items()}, source)
    flat = {}
    for name, path in table.items():
        with np.errstate(over="ignore"):
            array = jnp.asarray(from_torch(path, np.asarray(state_dict[name])).astype(dtype))
        if not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{source}: tensor {name} holds a NaN or an infinity (as {jnp.dtype(dtype).name})")
        flat[path] = array
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _check_names(state_dict: Mapping[str, np.ndarray], expected: dict[str, tuple[int, ...]], source: str) -> None:
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in state_dict]
    unexpected = [f"{name} {tuple(array.shape)}" for name, array in state_dict.items() if name not in expected]
    misshaped = [
        f"{name}: file {tuple(state_dict[name].shape)}, model {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if names:
            more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
            problems.append("\n  ".join([f"{len(names)} {kind}:", *sorted(names)[:_LISTED], *more]))
    if problems:
        raise ValueError("\n".join([f"{source} does not fit the model that its config describes:", *problems]))


def state_dict_of(params: Any, dtype: Any = None) -> dict[str, np.ndarray]:
    """Parameters -> PyTorch names and arrays, cast to `dtype` if given.

    Raises:
      ValueError: a tensor holds a NaN or an infinity, or overflows `dtype`.
    """
    state_dict = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(leaf)
        with np.errstate(over="ignore"):
            array = to_torch(path, array if dtype is None else array.astype(dtype))
        if not np.all(np.isfinite(array)):
            raise ValueError(f"parameter {path} holds a NaN or an infinity as {array.dtype.name}; it cannot be saved")
        state_dict[torch_name(path)] = array
    return state_dict


def write_safetensors(state_dict: dict[str, np.ndarray], path: str) -> None:
    """Writes a safetensors file that PyTorch's loaders accept, with a new file's usual permissions."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    safetensors.numpy.save_file(state_dict, path, metadata={"format": "pt"})
    os.chmod(path, mode)  # some versions write a file that only its owner can read
