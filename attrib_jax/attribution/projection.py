"""Seeded random projections of gradients: inner products are kept in expectation, and the matrix is never held whole.

The weights are cut into blocks, each leaf by itself, and each block's part of the matrix is a function of (key, leaf
name, number of the block in its leaf) through threefry2x32. So a projection is the same on every device and host, in
whatever order the leaves come, and can be continued years later.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice, check_positive
from attrib_jax.core.fingerprint import name_hash
from attrib_jax.core.keys import check_key
from attrib_jax.core.weights import flatten_names
from attrib_jax.ops.matmul_precision import full_precision_matmuls

PROJECTIONS = ("sparse", "rademacher")

# Entries other than zero of each weight's row in the sparse matrix.
STRIPES = 4
# Weights in a block of the dense matrix: a block of 2,048 columns fits a core's cache.
DENSE_ROWS = 256
# Random bits are drawn as words of this many.
_WORD = 32
# Weights of the sparse matrix that one step of the loop takes.
_SPARSE_ROWS_PER_STEP = 2**15


def check_projection(kind: str, dim: int) -> None:
    """Raises ValueError unless `kind` is known and `dim` suits it."""
    check_choice("projection", kind, PROJECTIONS)
    check_positive("projection_dim", dim, integer=True)
    if kind == "sparse" and dim % STRIPES:
        raise ValueError(
            f"projection_dim is {dim}: expected a multiple of {STRIPES} for projection='sparse'. Change projection_dim."
        )


def project(gradients: Any, key: jax.Array, kind: str, dim: int) -> jax.Array:
    """Projects B gradients to `dim` numbers each -> (B, dim); <project(a), project(b)> has the expectation <a, b>.

    Every block of the matrix is made once and multiplied with all B gradients, so larger batches cost less each.

    `rademacher`: each entry is +-1/sqrt(dim), independently (Achlioptas 2003; the projection of TRAK). Entry (i, j) of
    a block is positive where bit j % 32 of word [i, j // 32] of its random bits is 0.

    `sparse`: each weight meets 4 of the numbers, one in each quarter of them, with +-1/2 (the block construction of
    Kane & Nelson, "Sparser Johnson-Lindenstrauss transforms", 2014). A block has dim / 4 weights; in each quarter it
    is rotated by a random number of places, so that weights of different blocks meet with probability 4 / dim, and
    those of one block never. Signs are independent, so the variance of an inner product is that of hashing every
    weight by itself, (|a|^2 |b|^2 + <a, b>^2) / dim at most, as of the dense matrix, at a hundredth of its cost.
    Nothing is scattered: results are bitwise the same on devices that add up in any order.

    Args:
      gradients: nested dict of arrays (B, *shape), one of float32 or float64.
      key: a scalar threefry key, such as `purpose_key(seed, "projection")`.
      kind: `sparse` or `rademacher`.
      dim: numbers in all; a multiple of 4 for `sparse`.

    Raises:
      TypeError: `key` is no typed threefry key.
      ValueError: unknown `kind`, or a `dim` that does not suit it.
    """
    check_key(key)
    check_projection(kind, dim)
    rows = DENSE_ROWS if kind == "rademacher" else dim // STRIPES
    blocks, keys = _blocks(gradients, key, rows)
    with full_precision_matmuls():
        return (_dense if kind == "rademacher" else _sparse)(blocks, keys, dim)


def _blocks(gradients: Any, key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The weights of all leaves in blocks (blocks, rows, B), each leaf's last padded with zeros, and their keys."""
    blocks, keys = [], []
    for name, leaf in sorted(flatten_names(gradients).items()):
        flat = leaf.reshape(len(leaf), -1).T
        count = -(-len(flat) // rows)
        blocks.append(jnp.pad(flat, ((0, count * rows - len(flat)), (0, 0))).reshape(count, rows, -1))
        leaf_key = jax.random.fold_in(key, name_hash(name))
        keys.append(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(leaf_key, jnp.arange(count, dtype=jnp.uint32)))
    return jnp.concatenate(blocks), jnp.concatenate(keys)


def _dense(blocks: jax.Array, keys: jax.Array, dim: int) -> jax.Array:
    words = -(-dim // _WORD)
    shifts = jnp.arange(_WORD, dtype=jnp.uint32)

    def add_block(total, block_and_key):
        block, key = block_and_key
        bits = jax.random.bits(key, (DENSE_ROWS, words), jnp.uint32)[:, :, None] >> shifts & 1
        signs = 1 - 2 * bits.reshape(DENSE_ROWS, -1)[:, :dim].astype(block.dtype)
        return total + block.T @ signs, None

    total = jnp.zeros((blocks.shape[2], dim), blocks.dtype)
    return jax.lax.scan(add_block, total, (blocks, keys))[0] / math.sqrt(dim)


def _sparse(blocks: jax.Array, keys: jax.Array, dim: int) -> jax.Array:
    rows, batch = blocks.shape[1:]
    group = min(len(blocks), max(1, _SPARSE_ROWS_PER_STEP // rows))
    # Blocks of zeros fill the last step: whatever their matrix, they add nothing.
    padding = -len(blocks) % group
    blocks = jnp.pad(blocks, ((0, padding), (0, 0), (0, 0))).reshape(-1, group, rows, batch)
    keys = jnp.concatenate([keys, jnp.broadcast_to(keys[:1], (padding,))]).reshape(-1, group)

    def dealt(block, key):
        bits = jax.random.bits(key, (rows + STRIPES,), jnp.uint32)
        signs = 1 - 2 * (bits[:rows, None] >> jnp.arange(STRIPES, dtype=jnp.uint32) & 1).astype(block.dtype)
        shifts = bits[rows:] % rows
        return jax.vmap(lambda stripe_signs, shift: jnp.roll(block * stripe_signs[:, None], shift, axis=0))(
            signs.T, shifts
        )

    def add_group(total, group_and_keys):
        return total + jnp.sum(jax.vmap(dealt)(*group_and_keys), axis=0), None

    total = jnp.zeros((STRIPES, rows, batch), blocks.dtype)
    total = jax.lax.scan(add_group, total, (blocks, keys))[0]
    return total.reshape(dim, batch).T / math.sqrt(STRIPES)
