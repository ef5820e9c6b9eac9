"""PyTorch files (.bin, .pt, .pth, .ckpt) opened as named tensors, without running what they hold.

Needs PyTorch; everything else in this package works without it.
"""

import os
import pickle
import threading
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np

from attrib_jax.convert.weights.tensors import EXTRA_TYPES, LazyTensor, dtype_of

_WRAPPERS = ("state_dict", "model")  # keys under which training programs keep the state dict
_MAX_DEPTH = 8  # of dicts within dicts
_MODULE_STATE = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str)
_ONE_BY_ONE = threading.Lock()  # PyTorch keeps its list of permitted classes per process


def open_torch(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Opens what `torch.save` wrote: a dict of tensors, or a training checkpoint around one.

    A dict under the key `state_dict` or `model` is taken for the whole; the tensors of other dicts within dicts are
    named by their keys joined with dots. The file is memory-mapped (one of PyTorch before 1.6 is read whole), and
    nothing in it is executed: PyTorch reads it with weights_only=True, and objects of classes that this does not
    know, such as a training framework's callbacks, become empty stand-ins.

    Returns:
      Name -> tensor, and the numbers and strings that lie beside the state dict, such as `global_step`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: PyTorch is not installed; the file is damaged, compressed or no PyTorch file; it holds a pickled
        module instead of a state dict, or no tensors by name; a tensor is sparse, quantized or of an unknown type.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weight file {path} does not exist")
    content = _load(path)
    plain: dict[str, Any] = {}
    for _ in range(_MAX_DEPTH):
        if isinstance(content, _StandIn):
            raise ValueError(
                f"{path} holds a whole pickled object of class {_class_path(content)} and not a state dict, and is not "
                "executed; load it where it was made and save its state_dict()"
            )
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of names and tensors")
        content = _entries(content)
        plain |= {key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, _PLAIN)}
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict | _StandIn)]
        if not inner:
            break
        content = inner[0]
    tensors: dict[str, LazyTensor] = {}
    _collect(path, content, "", tensors, set())
    if not tensors:
        keys = ", ".join(repr(key) for key in list(content)[:20])
        raise ValueError(f"{path} holds no tensors by name; its keys: {keys or 'none'}")
    return tensors, plain


def _entries(content: Any) -> dict:
    """The items of a dict, with the parameters, buffers and members of what was a torch.nn module.

    `nn.ParameterDict`, as textual inversion saves its tokens, `nn.ParameterList` and `nn.Embedding` are such.
    """
    items = dict(content) if isinstance(content, dict) else {}
    for kind in _MODULE_STATE:
        held = getattr(content, "__dict__", {}).get(kind)
        items |= held if isinstance(held, dict) else {}
    return items


def _collect(
    path: str, content: Any, prefix: str, tensors: dict[str, LazyTensor], seen: set[int], depth: int = 0
) -> None:
    """Adds the tensors of nested dicts to `tensors`; each dict once, for a file may refer to one many times."""
    import torch

    seen.add(id(content))
    for key, value in _entries(content).items():
        if not isinstance(key, str):
            continue
        name = prefix + key
        if isinstance(value, torch.Tensor):
            tensors[name] = _tensor(path, name, value)
        elif isinstance(value, dict | _StandIn) and id(value) not in seen and depth < _MAX_DEPTH:
            _collect(path, value, f"{name}.", tensors, seen, depth + 1)


def _tensor(path: str, name: str, tensor: Any) -> LazyTensor:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    try:
        dtype = dtype_of(kind)
    except TypeError:
        raise ValueError(f"{path}: tensor {name} has the type {kind}, which is not supported") from None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(
            f"{path}: tensor {name} is no plain tensor ({tensor.layout}, on {tensor.device}); save it dense"
        )
    shape = tuple(tensor.shape)
    # A tensor may repeat one stored number over any shape: such a file could ask for any amount of memory.
    if tensor.numel() * dtype.itemsize > os.path.getsize(path):
        raise ValueError(f"{path}: tensor {name} of shape {shape} is larger than the file; copy or download it again")
    words = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)

    def read() -> np.ndarray:
        stored = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if kind in EXTRA_TYPES:  # PyTorch does not convert them; they pass as integers of the same size
            return stored.view(words).numpy().view(dtype).copy()
        return stored.numpy().copy()

    return LazyTensor(shape, dtype, read)


def _load(path: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} needs PyTorch: pip install torch, or convert the file to safetensors ({error})"
        ) from error
    if path.endswith(".safetensors"):  # torch.load would go by the name
        raise ValueError(f"{path} is a PyTorch file under the name of a safetensors file; rename it to end in .bin")
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise ValueError(f"{path} needs PyTorch 2.6 or newer, found {torch.__version__}; older ones read it unsafely")
    with open(path, "rb") as file:
        zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_zip(path)
    try:
        with _ONE_BY_ONE, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's remarks on old files are no concern of the user
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
            with torch.serialization.safe_globals([(_stand_in(name), name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise ValueError(
            f"{path} is damaged, or no file of tensors that torch.load(weights_only=True) accepts ({_reason(error)}); "
            "copy or download it again, or convert it to safetensors where it was made"
        ) from error


def _reason(error: Exception) -> str:
    """The cause in one line, without PyTorch's advice to switch its protection off."""
    cause = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def _check_zip(path: str) -> None:
    """Refuses a compressed archive: PyTorch maps members as they lie in the file, and their size has no limit."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [member.filename for member in archive.infolist() if member.compress_type]
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is a damaged archive ({error}); copy or download it again") from error
    if compressed:
        raise ValueError(
            f"{path} is a zip with compressed members ({compressed[0]}), such as a TorchScript archive, and not what "
            "torch.save writes; save the model's state_dict() with torch.save"
        )


class _StandIn:
    """What becomes of an object whose class PyTorch does not trust: nothing is run, and only tensors are kept."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({kind: state[kind] for kind in _MODULE_STATE if isinstance(state.get(kind), dict)})


class _DictStandIn(_StandIn):
    """The same for subclasses of dict, whose items PyTorch puts into nothing but its own dicts."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _stand_in(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    base = _DictStandIn if name.endswith("Dict") or name in ("dict", "defaultdict") else _StandIn
    return type(name, (base,), {"__module__": module})


def _class_path(instance: Any) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
