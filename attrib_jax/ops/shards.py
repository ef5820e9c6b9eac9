"""Parameters of which each of several devices holds a part: made whole where the model reads them.

Within a program that runs on every device of a mesh with the axis `model`, a divided parameter is a `Shard`. The
predictor calls `gather` on its parameters, so the compiler sees one all-gather for each leaf, next to the layer that
reads it, and holds a few whole leaves at a time. The derivative by a `Shard` is a `Shard` of the sum over the devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# The mesh axis that parameters are divided over.
MODEL_AXIS = "model"

# What a backward pass computes again from the parts, so that no whole parameter is kept for it: the gathering itself,
# and what only moves or rounds numbers and may stand between it and a product.
_COMPUTED_AGAIN = {
    "all_gather",
    "broadcast_in_dim",
    "convert_element_type",
    "optimization_barrier",
    "reshape",
    "squeeze",
    "transpose",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """A device's part of a parameter, a pytree; outside of programs the parameter that is to be divided.

    Attributes:
      value: the array.
      axis: the axis of the parameter that is divided over the mesh axis `model`.
    """

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})


def is_shard(node: Any) -> bool:
    """Whether a node of a tree is a `Shard`."""
    return isinstance(node, Shard)


def has_shards(tree: Any) -> bool:
    """Whether a parameter of `tree` is divided."""
    return any(map(is_shard, jax.tree.leaves(tree, is_leaf=is_shard)))


def map_parameters(fn: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map` in which a `Shard` is one leaf."""
    return jax.tree.map(fn, *trees, is_leaf=is_shard)


def gather(tree: Any) -> Any:
    """`tree` with every `Shard` as the whole parameter; without one `tree` as it is."""
    return map_parameters(_whole, tree)


def call_with_whole(fn: Callable[..., Any], params: Any, *others: Any) -> Any:
    """`fn(params, *others)` with every `Shard` among `params` whole, which a backward pass gathers again."""

    def gathered(params, *others):
        return fn(gather(params), *others)

    return jax.checkpoint(gathered, policy=_is_kept)(params, *others)


def _whole(leaf: Any) -> Any:
    if not is_shard(leaf):
        return leaf
    return jax.lax.all_gather(leaf.value, MODEL_AXIS, axis=leaf.axis, tiled=True)


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _COMPUTED_AGAIN
