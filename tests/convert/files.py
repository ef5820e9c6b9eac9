"""Weight files in either form, damaged at random, and such as try to run something."""

import builtins
import collections
import os
import pathlib
import subprocess
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from hypothesis import strategies as st


def as_torch(content: Any) -> Any:
    """`content` with tensors for arrays, in dicts of dicts too."""
    if isinstance(content, dict):
        return {name: as_torch(x) for name, x in content.items()}
    return torch.from_numpy(content.copy()) if isinstance(content, np.ndarray) else content


def save(content: Any, path: pathlib.Path, metadata: dict[str, str] | None = None) -> str:
    """Writes arrays and numbers as safetensors or, under another suffix, as torch.save does; returns the path."""
    if path.suffix == ".safetensors":
        arrays = {name: x if isinstance(x, np.ndarray) else np.asarray(x, np.float32) for name, x in content.items()}
        safetensors.numpy.save_file(arrays, path, metadata)
    else:
        torch.save(as_torch(content), path)
    return str(path)


class Call:
    """Pickles as the call `function(*arguments)`, as a hostile file does, with a state if given."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def altered(data: st.DataObject, content: bytes, first: int | None = None) -> bytes:
    """`content` with 1 to 4 bytes changed, of the `first` ones if given, and perhaps cut."""
    changed = bytearray(content)
    end = min(first or len(content), len(content)) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([len(content), len(content) // 2, 20]))])


CANARY = "canary"  # what an attack makes in the current folder
_CODE = f"open('{CANARY}', 'w')"
ATTACKS = {
    "os.system": lambda: Call(os.system, f"touch {CANARY}"),
    "eval": lambda: Call(eval, _CODE),
    "exec": lambda: Call(exec, _CODE),
    "open": lambda: Call(open, CANARY, "w"),
    "Popen": lambda: Call(subprocess.Popen, ["touch", CANARY]),
    "makedirs": lambda: Call(os.makedirs, CANARY),
    "getattr": lambda: Call(getattr, Call(__import__, "os"), "sep", state=Call(open, CANARY, "w")),
    "map": lambda: Call(list, Call(map, eval, [_CODE])),
    "argument of an allowed call": lambda: Call(collections.defaultdict, Call(builtins.open, CANARY, "w")),
    "state of an allowed object": lambda: Call(collections.OrderedDict, state={"x": Call(open, CANARY, "w")}),
}
