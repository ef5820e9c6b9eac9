"""The influence function, grad L(z) . F^-1 . grad L(z_hat): what one infinitesimal Newton step scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import example_mask
from attrib_jax.ops.matmul_precision import full_precision_matmuls


def influence_scores(
    loss_fn: Callable[[Any, Any, Any], jax.Array],
    selected: Any,
    rest: Any,
    batch: Any,
    direction: Any,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The derivative of each example's loss along `direction` -> (B,); METHOD.md sections 4 and 7.

    With `direction = curvature.solve(query_gradient)` this is the influence function; times step_size / num_examples it
    is the limit of the unlearning score for a small step. It is taken in forward mode, which gives the dot
    product of each per-example gradient with `direction` without ever holding the gradient.

    Args:
        loss_fn: `loss_fn(selected, rest, example) -> ()`, the loss of one example.
        selected: nested dict of the weights that would move.
        rest: the other weights.
        batch: pytree of arrays with a leading axis B; an example is one slice of it.
        direction: nested dict in the layout of `selected`.
        mask: (B,) 1 for an example, 0 for padding, which scores 0; all are examples if None.

    Raises:
        ValueError: `mask` is not (B,).
    """
    mask = example_mask(mask, batch)

    def derivative(example):
        return jax.jvp(lambda weights: loss_fn(weights, rest, example), (selected,), (direction,))[1]

    with full_precision_matmuls():
        scores = jax.vmap(derivative)(batch)
    return jnp.where(mask, scores, 0)


def influence_matrix(
    loss_fn: Callable[[Any, Any, Any], jax.Array],
    selected: Any,
    rest: Any,
    batch: Any,
    directions: Any,
    examples_at_once: int | None = None,
) -> jax.Array:
    """`influence_scores` of B examples along Q directions at once -> (B, Q).

    In reverse mode: one per-example gradient, dotted with every direction, so the cost hardly grows with Q. With
    `directions` the weight changes of Q unlearned queries these are the linearised scores of all of them.

    Args:
        loss_fn, selected, rest, batch: as in `influence_scores`; padding is the caller's to drop.
        directions: nested dict in the layout of `selected`, every leaf with a leading axis Q.
        examples_at_once: how many gradients, and activations to compute them from, are held at a time; all if None.
    """

    def row(example):
        gradient = jax.grad(loss_fn)(selected, rest, example)
        products = jax.tree.map(lambda g, d: d.reshape(d.shape[0], -1) @ g.reshape(-1), gradient, directions)
        return sum(jax.tree.leaves(products))

    with full_precision_matmuls():
        if examples_at_once is None:
            return jax.vmap(row)(batch)
        return jax.lax.map(row, batch, batch_size=examples_at_once)
