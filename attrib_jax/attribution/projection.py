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
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.models.projected_text import ProjectedWeights
from attrib_jax.ops.matmul_precision import full_precision_matmuls

PROJECTIONS = ("sparse", "grouped", "factored", "rademacher")

# Entries other than zero of each weight's row in the sparse matrix.
STRIPES = 4
# The grouped matrix has one: every weight is added to one number, or subtracted from it.
_STRIPES_OF = {"sparse": STRIPES, "factored": STRIPES, "grouped": 1}
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
    if dim % _STRIPES_OF.get(kind, 1):
        raise ValueError(
            f"projection_dim is {dim}: expected a multiple of {STRIPES} for projection={kind!r}. Change projection_dim."
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

    `grouped`: as `sparse` with one number a weight, and +-1: signs, and sums of weights that are dealt into `dim`
    groups (the compression of DMin, CVPR 2026, with rotations for permutations), at a quarter of the cost. The bound of
    the variance is the same, its tails are heavier where a few weights hold most of a gradient.

    `factored`: as `sparse`, of what `sketch` leaves of the gradients, which is `gradients` here.

    Args:
      gradients: nested dict of arrays (B, *shape), one of float32 or float64.
      key: a scalar threefry key, such as `purpose_key(seed, "projection")`.
      kind: see `PROJECTIONS`.
      dim: numbers in all; a multiple of 4 for `sparse` and `factored`.

    Raises:
      TypeError: `key` is no typed threefry key.
      ValueError: unknown `kind`, or a `dim` that does not suit it.
    """
    check_key(key)
    check_projection(kind, dim)
    with full_precision_matmuls():
        if kind == "rademacher":
            return _dense(*_blocks(gradients, key, DENSE_ROWS), dim)
        stripes = _STRIPES_OF[kind]
        return _sparse(*_blocks(gradients, key, dim // stripes), dim, stripes)


def sketch(gradient: ProjectedWeights, columns: jax.Array, key: jax.Array, side: int) -> Any:
    """Two-sided sketches of B gradients by matrices, from their factors: the dense gradients are never formed.

    The gradient by a kernel (D, F) that projects the text is G = c^T g, with the text c (L, D) and the cotangent
    g (L, F) of its projection. Its sketch is P^T G Q = (c P)^T (g Q), with P (D, side) and Q (F, side) of independent
    +-1/sqrt(side); a side that is not larger than `side` stays as it is, and so do leaves without two sides. Inner
    products are kept in expectation. The variance of |P^T G Q|^2 is at most ((1 + 2 / side)^2 - 1) |G|^4, which a G of
    rank 1 comes near; errors of different leaves are independent.

    Args:
      gradient: B gradients, as `kernel_gradient` takes them; leaves of `others` may be dense.
      columns: (B, D, L) transposed text states.
      key: threefry key; each matrix is a function of it, of the leaf's name and of the side.
      side: numbers in place of each longer side.

    Returns:
      A nested dict in the layout of the weights, with leaves (B, min(D, side), min(F, side)).
    """
    check_key(key)
    check_positive("projection_side", side, integer=True)
    key = jax.random.fold_in(key, name_hash("sides"))

    def matrix(name: str, number: int, size: int, dtype) -> jax.Array | None:
        if size <= side:
            return None
        own = jax.random.fold_in(jax.random.fold_in(key, name_hash(name)), number)
        return jax.random.rademacher(own, (size, side), dtype) / math.sqrt(side)

    def right(array, name, number):
        by = matrix(name, number, array.shape[-1], array.dtype)
        return array if by is None else array @ by

    found = {}
    with full_precision_matmuls():
        for name, leaf in flatten_names(gradient.projections).items():
            rows = right(jnp.swapaxes(columns, -1, -2), name, 0)
            found[name] = jnp.swapaxes(rows, -1, -2) @ right(leaf, name, 1)
        for name, leaf in flatten_names(gradient.others).items():
            if leaf.ndim == 3:
                leaf = right(leaf, name, 1)
                leaf = jnp.swapaxes(right(jnp.swapaxes(leaf, -1, -2), name, 0), -1, -2)
            found[name] = leaf
    return unflatten_names(found)


def sketched_numbers(selected: Any, side: int) -> int:
    """Numbers in the sketch of one gradient by the weights `selected`."""
    shapes = [leaf.shape for leaf in flatten_names(selected).values()]
    return sum(
        math.prod(min(size, side) for size in shape) if len(shape) == 2 else math.prod(shape) for shape in shapes
    )


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


def _sparse(blocks: jax.Array, keys: jax.Array, dim: int, stripes: int) -> jax.Array:
    rows, batch = blocks.shape[1:]
    group = min(len(blocks), max(1, _SPARSE_ROWS_PER_STEP // rows))
    # Blocks of zeros fill the last step: whatever their matrix, they add nothing.
    padding = -len(blocks) % group
    blocks = jnp.pad(blocks, ((0, padding), (0, 0), (0, 0))).reshape(-1, group, rows, batch)
    keys = jnp.concatenate([keys, jnp.broadcast_to(keys[:1], (padding,))]).reshape(-1, group)

    def dealt(block, key):
        bits = jax.random.bits(key, (rows + stripes,), jnp.uint32)
        signs = 1 - 2 * (bits[:rows, None] >> jnp.arange(stripes, dtype=jnp.uint32) & 1).astype(block.dtype)
        shifts = bits[rows:] % rows
        return jax.vmap(lambda stripe_signs, shift: jnp.roll(block * stripe_signs[:, None], shift, axis=0))(
            signs.T, shifts
        )

    def add_group(total, group_and_keys):
        return total + jnp.sum(jax.vmap(dealt)(*group_and_keys), axis=0), None

    total = jnp.zeros((stripes, rows, batch), blocks.dtype)
    total = jax.lax.scan(add_group, total, (blocks, keys))[0]
    return total.reshape(dim, batch).T / math.sqrt(stripes)
