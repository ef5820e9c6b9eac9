"""The renaming between PyTorch state dicts and Flax parameter trees.

A Flax tree fixes the PyTorch side exactly: its path gives the name (`resnets_0/conv1/kernel` is
`resnets.0.conv1.weight`), its leaf name and rank give the axis order. The other direction is looked up in the table
that this makes, so neither is guessed from names.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from attrib_jax.convert.weights.tensors import Tensor

_WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# PyTorch modules whose own names end in a number, unlike the members of a list (`resnets.0`), which Flax joins by `_`.
_NUMBERED_MODULES = frozenset({"linear_1", "linear_2", "wi_0", "wi_1"})
# Kernels by rank: HWIO -> OIHW for convolutions, (in, out) -> (out, in) for linear layers.
_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


def torch_name(path: str) -> str:
    """The PyTorch name of the Flax parameter at `path`, its keys joined by `/`."""
    *modules, leaf = path.split("/")
    parts = [part if part in _NUMBERED_MODULES else re.sub(r"_(\d+)$", r".\1", part) for part in modules]
    return ".".join([*parts, "weight" if leaf in _WEIGHT_LEAVES else leaf])


def name_table(params: Any) -> dict[str, str]:
    """PyTorch name -> Flax path, for every leaf of a parameter tree (arrays or `jax.ShapeDtypeStruct`s)."""
    return {torch_name(path): path for path in flax.traverse_util.flatten_dict(params, sep="/")}


def torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The axes of a Flax parameter in PyTorch's order: `torch_array = flax_array.transpose(torch_axes(...))`."""
    if path.rsplit("/", 1)[-1] == "kernel":
        return _KERNEL_AXES[ndim]
    return tuple(range(ndim))


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives the Flax parameter at `path`."""
    return tuple(shape[axis] for axis in torch_axes(path, len(shape)))


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """A Flax parameter in PyTorch's layout, contiguous."""
    return np.asarray(np.transpose(array, torch_axes(path, array.ndim)), order="C")


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    return np.asarray(np.transpose(array, np.argsort(torch_axes(path, array.ndim))), order="C")


def text_encoder_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text state dict under the names of published checkpoints.

    transformers 5 saves without the `text_model.` level, older versions with it and with a `position_ids` buffer.
    """
    complete = ("text_model.", "text_projection.")
    renamed = {name if name.startswith(complete) else f"text_model.{name}": x for name, x in state_dict.items()}
    renamed.pop("text_model.embeddings.position_ids", None)
    return renamed


def tower_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A feature tower's state dict without what a feature does not need: poolers, mask tokens and buffers.

    Files of a classifier have the whole model below `vit.` or `dinov2_with_registers.`.
    """
    prefixes = ("vit.", "dinov2_with_registers.")
    below = {name: x for name, x in state_dict.items() if name.startswith(prefixes)}
    renamed = {name.split(".", 1)[1]: x for name, x in below.items()} or state_dict
    unused = re.compile(r"pooler\..*|embeddings\.mask_token|.*\.position_ids")
    return {name: x for name, x in renamed.items() if not unused.fullmatch(name)}


def vae_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder state dict with the attention names that diffusers uses since 0.15: older files say `query`."""
    renames = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")

    def rename(name: str) -> str:
        match = pattern.search(name)
        return f"{name[: match.end(1)]}{renames[match[2]]}.{match[3]}" if match else name

    return {rename(name): array for name, array in state_dict.items()}


def t5_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A T5 encoder's state dict without the second name of its embeddings, which older files hold."""
    renamed = dict(state_dict)
    tied = renamed.pop("encoder.embed_tokens.weight", None)
    return renamed if tied is None else {"shared.weight": tied, **renamed}
