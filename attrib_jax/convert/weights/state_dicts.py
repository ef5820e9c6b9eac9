"""State dicts <-> parameter trees, checked name by name and converted leaf by leaf; needs no PyTorch."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.weights.names import from_torch, name_table, to_torch, torch_name, torch_shape
from attrib_jax.convert.weights.tensors import LazyTensor, Tensor
from attrib_jax.core.checks import raise_problems


def abstract_params(module: Any, *inputs: Any) -> Any:
    """The parameter tree of a Flax module as `jax.ShapeDtypeStruct`s; `inputs` are what its `__call__` takes.

    Of a module without parameters it is empty. Nothing is compiled.
    """

    def init(*inputs):
        return module.init(jax.random.key(0, impl="threefry2x32"), *inputs)

    return jax.eval_shape(init, *inputs).get("params", {})


def load_params(
    state_dict: Mapping[str, Tensor], abstract: Any, dtype: Any = jnp.float32, source: str = "state dict"
) -> Any:
    """A PyTorch state dict as the nested dict of arrays that a Flax module takes.

    Names, shapes and types are checked before anything is read; then the tensors are read and converted one by one,
    so that a model takes the memory of its parameters and of one tensor more.

    Args:
      state_dict: PyTorch names and tensors, from `open_weights` or in memory.
      abstract: the wanted tree, from `abstract_params`.
      dtype: dtype of the returned arrays, whatever the file holds.
      source: what the error messages call the state dict, usually its file.

    Raises:
      ValueError: tensors are missing, unexpected, misshaped or no floating-point numbers (all are listed), one holds
        a NaN or an infinity after the cast to `dtype`, or `dtype` is float64 while JAX has 64-bit types switched off.
    """
    if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
        raise ValueError(f"dtype={jnp.dtype(dtype).name} needs 64-bit types: set jax_enable_x64, or load as float32")
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(abstract, sep="/").items()}
    table = name_table(abstract)
    _check_names(state_dict, {name: torch_shape(path, shapes[path]) for name, path in table.items()}, source)
    flat = {path: _load_leaf(name, state_dict[name], path, dtype, source) for name, path in table.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _load_leaf(name: str, tensor: Tensor, path: str, dtype: Any, source: str) -> jax.Array:
    with np.errstate(over="ignore"):
        array = from_torch(path, np.asarray(tensor)).astype(dtype)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{source}: tensor {name} holds a NaN or an infinity (as {jnp.dtype(dtype).name})")
    # `jnp.asarray` would compile a program for every shape and keep it, 1.4 MB and 20 ms each.
    return jax.device_put(array)


def _check_names(state_dict: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]], source: str) -> None:
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in state_dict]
    unexpected = [f"{name} {tuple(array.shape)}" for name, array in state_dict.items() if name not in expected]
    misshaped = [
        f"{name}: file {tuple(state_dict[name].shape)}, model {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    mistyped = [
        f"{name}: {state_dict[name].dtype}"
        for name in expected
        if name in state_dict and not jnp.issubdtype(state_dict[name].dtype, jnp.floating)
    ]
    raise_problems(
        f"{source} does not fit the model that its config describes:",
        {"missing": missing, "unexpected": unexpected, "misshaped": misshaped, "not floating-point": mistyped},
    )


def state_dict_of(params: Any, dtype: Any = None) -> dict[str, LazyTensor]:
    """Parameters -> PyTorch names and tensors, each laid out for PyTorch, and cast to `dtype` if given, when read."""
    return {
        torch_name(path): _torch_leaf(path, leaf, dtype)
        for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }


def _torch_leaf(path: str, leaf: Any, dtype: Any) -> LazyTensor:
    dtype = leaf.dtype if dtype is None else dtype

    def load() -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which `write_weights` refuses
            return to_torch(path, np.asarray(leaf).astype(dtype, copy=False))

    return LazyTensor(torch_shape(path, leaf.shape), dtype, load)
