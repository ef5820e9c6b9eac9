"""Compensated sums: unevaluated pairs `high + low`, which double the precision of a dtype.

Knuth's two-sum, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp


class CompensatedSum(NamedTuple):
    """An unevaluated sum `high + low` of two trees of one layout; `+` adds two of them. Integers stay exact in `high`.

    Attributes:
      high: tree of arrays, the sum rounded to their dtypes.
      low: what rounding took from `high`, in the same layout.
    """

    high: Any
    low: Any

    @classmethod
    def of(cls, tree: Any) -> Self:
        """The sum of one tree alone."""
        return cls(tree, jax.tree.map(jnp.zeros_like, tree))

    def __add__(self, other: "CompensatedSum") -> "CompensatedSum":  # type: ignore[override]
        layout = jax.tree.structure(self.high)
        leaves = zip(*(jax.tree.leaves(tree) for tree in (*self, *other)))
        high, low = zip(*(_two_sum(*parts) for parts in leaves))
        return CompensatedSum(jax.tree.unflatten(layout, high), jax.tree.unflatten(layout, low))

    def value(self) -> Any:
        """The sum, rounded once."""
        return jax.tree.map(jnp.add, self.high, self.low)


def _two_sum(high: Any, low: Any, other_high: Any, other_low: Any) -> tuple[Any, Any]:
    """(high + low) + (other_high + other_low) as a pair; the rounding error of the high parts is recovered exactly."""
    total = high + other_high
    share = total - high
    error = (high - (total - share)) + (other_high - share)
    return total, error + (low + other_low)
