"""Softmax attention that never holds more logits than fit into memory."""

import jax
import jax.numpy as jnp

# Logits that one call holds; above, it goes through the queries in blocks. Stable Diffusion's first level has 134
# million for an image of 512 pixels.
LOGITS_AT_ONCE = 2**24


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> jax.Array:
    """Softmax attention, D split over `num_heads`: query (B, Q, D), key and value (B, L, D) -> (B, Q, D).

    Args:
      query: (B, Q, D).
      key, value: (B, L, D), or (1, L, D) for those of all queries.
      num_heads: divisor of D.
      mask: (Q, L), added to the logits; not with (1, L, D).
      key_mask: (B, L), or (1, L) with (1, L, D): added to the logits of all queries; not with `mask`.
      logits_at_once: logits of all examples and heads that are held at once. Callers that bound their batch themselves
        multiply it by B, so that the number of blocks depends on one example alone.
    """
    if key.shape[0] == 1 < query.shape[0] and mask is None:
        # One after the other they are the queries of one example: there is nothing to transpose.
        folded = query.reshape(1, -1, query.shape[-1])
        mixed = attention(folded, key, value, num_heads, key_mask=key_mask, logits_at_once=logits_at_once)
        return mixed.reshape(query.shape)
    *batch, length, width = query.shape
    head_dim = width // num_heads

    # Contiguous matrices for each example and head are several times as fast on a CPU. Keys and values are held as
    # their transposes: the products of the backward pass are then as wide as the text or the image, not as a head.
    def split(x):
        """(B, L, D) -> (B * heads, L, head_dim)."""
        heads = x.reshape(*x.shape[:-1], num_heads, head_dim)
        return jnp.swapaxes(heads, -3, -2).reshape(-1, x.shape[-2], head_dim)

    def split_transposed(x):
        """(B, L, D) -> (B * heads, head_dim, L)."""
        heads = x.reshape(*x.shape[:-1], num_heads, head_dim)
        return jnp.moveaxis(heads, -3, -1).reshape(-1, head_dim, x.shape[-2])

    query, key, value = split(query), split_transposed(key), split_transposed(value)
    if key_mask is not None:
        # The same for each head and query, so that it goes with any block of queries.
        key_mask = jnp.repeat(key_mask, num_heads, axis=0)[:, None]
    num_blocks = -(-length * len(query) * key.shape[-1] // logits_at_once)
    # Only images have so many tokens, and they have no mask.
    if num_blocks == 1 or mask is not None:
        mixed = _attend(query, key, value, key_mask if mask is None else mask)
    else:
        # Block by block of queries, and in a backward pass again: the logits of all are never held.
        count, size = len(query), -(-length // num_blocks)
        blocks = jnp.pad(query, ((0, 0), (0, num_blocks * size - length), (0, 0)))
        blocks = jnp.moveaxis(blocks.reshape(count, num_blocks, size, head_dim), 1, 0)
        mixed = jax.lax.map(jax.checkpoint(lambda block: _attend(block, key, value, key_mask)), blocks)
        mixed = jnp.moveaxis(mixed, 0, 1).reshape(count, num_blocks * size, head_dim)[:, :length]
    mixed = mixed.reshape(*batch, num_heads, length, head_dim)
    return jnp.swapaxes(mixed, -3, -2).reshape(*batch, length, width)


def _attend(query, key, value, mask=None):
    """Attention of separate heads: query (N, Q, d), key and value (N, d, L), mask (Q, L) or (N, 1, L) -> (N, Q, d)."""
    wide = jnp.promote_types(jnp.result_type(query, key), jnp.float32)
    logits = jnp.einsum("nqd,ndl->nql", query * query.shape[-1] ** -0.5, key, preferred_element_type=wide)
    if mask is not None:
        logits = logits + mask
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided last: on d numbers a query instead of L.
    mixed = jnp.einsum("nql,ndl->nqd", weights.astype(value.dtype), value, preferred_element_type=wide) / total
    return mixed.astype(value.dtype)
