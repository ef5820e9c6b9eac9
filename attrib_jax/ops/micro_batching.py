"""Micro-batching: how many forward passes a device runs at once, where those of a whole tile would not fit into memory.

The activations of a UNet's forward pass grow with its latent pixels: 256 for the MSCOCO model, 4,096 for Stable
Diffusion at 512 pixels. Tiles have one size for every model; these limits cut those of large ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Latent pixels of the forward passes that are held at once, and of those whose activations a backward pass needs.
FORWARD_PIXELS = 2**17
GRADIENT_PIXELS = 2**14
# On a CPU 32 and 4 forward passes of the MSCOCO model: their arrays stay in its caches, and it waits for its memory.
_CPU_FORWARD_PIXELS = 2**13
_CPU_GRADIENT_PIXELS = 2**10


def forward_pixels(platform: str | None = None) -> int:
    """Latent pixels of the forward passes that a device holds at once, of several examples.

    `platform` is that of the devices which run the program, such as "cpu" or "tpu"; JAX's default backend if None.
    """
    return _CPU_FORWARD_PIXELS if (platform or jax.default_backend()) == "cpu" else FORWARD_PIXELS


def gradient_pixels(platform: str | None = None) -> int:
    """As `forward_pixels`, of the forward passes whose activations are held, of several draws."""
    return _CPU_GRADIENT_PIXELS if (platform or jax.default_backend()) == "cpu" else GRADIENT_PIXELS


def num_pixels(latent_shape: tuple[int, ...]) -> int:
    """Latent pixels of one forward pass, (h, w, c) -> h w."""
    height, width, _ = latent_shape
    return height * width


def group_size(count: int, pixels: int, limit: int) -> int:
    """The number of `count` entries of `pixels` each to run at once: all, or else no more than `limit` allows.

    A divisor of `count` where one is large enough, since a smaller last group is a second program to compile.
    """
    most = max(1, limit // pixels)
    divisor = even_group_size(count, pixels, limit)
    return divisor if divisor == count or 2 * divisor >= most else most


def even_group_size(count: int, pixels: int, limit: int) -> int:
    """As `group_size`, always a divisor of `count`."""
    return max(size for size in range(1, count + 1) if count % size == 0 and (size == 1 or size * pixels <= limit))


def map_groups(fn: Callable[[Any], Any], size: int, batch: Any) -> Any:
    """`fn` of a batch, `size` entries of the first axis at a time; unlike with `jax.lax.map`, `fn` takes a whole group.

    `batch` and the result are pytrees of arrays with that axis; the last group may be smaller.
    """
    count = len(jax.tree.leaves(batch)[0])
    whole = count - count % size
    groups = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // size, size, *leaf.shape[1:]), batch)
    results = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), jax.lax.map(fn, groups))
    if whole == count:
        return results
    last = fn(jax.tree.map(lambda leaf: leaf[whole:], batch))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), results, last)


def sum_groups(fn: Callable[[Any], Any], batch: Any, size: int) -> Any:
    """Sums `fn` of groups of `size` entries of a batch's first axis, a multiple of `size`; `fn` sums over a group."""
    count = len(jax.tree.leaves(batch)[0])
    if count == size:
        return fn(batch)
    groups = jax.tree.map(lambda leaf: leaf.reshape(count // size, size, *leaf.shape[1:]), batch)
    # From zeros, so that `fn` is compiled once.
    group = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, group))
    add = functools.partial(jax.tree.map, lambda old, new: old + new)
    return jax.lax.scan(lambda total, group: (add(total, fn(group)), None), zeros, groups)[0]
