"""Compensated sums: unevaluated pairs `high + low` (Knuth's two-sum), which double the precision of a dtype."""

from typing import Any


def add_pairs(high: Any, low: Any, other_high: Any, other_low: Any) -> tuple[Any, Any]:
    """(high + low) + (other_high + other_low) as a pair; the rounding error of the high parts is recovered exactly."""
    total = high + other_high
    share = total - high
    error = (high - (total - share)) + (other_high - share)
    return total, error + (low + other_low)
