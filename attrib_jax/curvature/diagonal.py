"""A diagonal Fisher information matrix, and its inverse applied to a gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.checks import check_range
from attrib_jax.core.weights import flatten_names, unflatten_names

# Gradients are multiplied by this before they are squared, and stored values are F * GRADIENT_SCALE**2. A float32
# square is exact to its last bits from 1.2e-38 to 3.4e38; so scaled, gradients from 2.6e-29 to 4e6 keep all digits of
# their square through a sum over a million samples, where unscaled squares underflow below 1e-19. A power of two
# changes no digit of anything that fits either way.
GRADIENT_SCALE = 2.0**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Diagonal curvature F (METHOD.md section 3), a pytree.

    Attributes:
      tree: nested dict in the layout of the selected weights, each leaf F * gradient_scale**2, F >= 0.
      gradient_scale: power of two; 1 (the default) where `tree` is F itself.
    """

    tree: Any
    gradient_scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def solve(self, tree: Any, damping: float = 0.0) -> Any:
        """F^-1 v: `tree` / (F + damping), elementwise, in `tree`'s layout; usable under `jit`.

        Where F + damping and v are both 0 the result is 0; where only F + damping is, it is infinite:
        `check_solvable` names such leaves beforehand.
        """
        scale = self.gradient_scale

        def divide(curvature, vector):
            denominator = curvature + damping * scale**2
            undefined = (denominator == 0) & (vector == 0)
            # The two factors of scale are applied on either side of the division, so that neither 1/F of a tiny F
            # nor a tiny vector leaves float32's range on the way.
            return jnp.where(undefined, 0, vector * scale / jnp.where(undefined, 1, denominator) * scale)

        return jax.tree.map(divide, self.tree, tree)

    def check_solvable(self, tree: Any, damping: float = 0.0) -> None:
        """Checks on the host that `solve(tree, damping)` is finite.

        Raises:
          ValueError: `damping` is negative, the layouts differ, or a leaf (named) holds NaN, a negative F, or F = 0
            where the gradient is not 0 and there is no damping.
        """
        check_range("damping", damping, low=0)
        curvature, vectors = flatten_names(self.tree), flatten_names(tree)
        shapes = {name: np.shape(leaf) for name, leaf in curvature.items()}
        expected = {name: np.shape(leaf) for name, leaf in vectors.items()}
        if shapes != expected:
            raise ValueError(_layout_difference(shapes, expected))
        for name, counts in jax.device_get(_count_obstacles(curvature, vectors)).items():
            if counts["vector"]:
                raise ValueError(f"The gradient of {name} holds NaN or infinity; check the model's weights and input.")
            if counts["curvature"]:
                raise ValueError(f"The Fisher information of {name} holds NaN, infinity or a negative value; refit it.")
            if counts["stuck"] and damping == 0:
                raise ValueError(
                    f"The Fisher information of {name} is 0 for {counts['stuck']} of {np.size(curvature[name])} values "
                    "whose gradient is not 0, so F^-1 is undefined there. Fit F on more samples, select fewer weights, "
                    "or set damping > 0."
                )

    def to_flat(self) -> dict[str, np.ndarray]:
        """F itself as '/'-joined name -> float64 array: exact, in the layout of published Fisher files."""
        scale = self.gradient_scale**2
        return {name: np.asarray(leaf, np.float64) / scale for name, leaf in flatten_names(self.tree).items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any], like: Any = None) -> "Diagonal":
        """The inverse of `to_flat`; leaves become float32 (float64 under x64), scaled by GRADIENT_SCALE**2.

        Args:
          flat: '/'-joined name -> F.
          like: the selected weights; if given, names and shapes must agree with it.

        Raises:
          ValueError: names or shapes differ from `like` (both sides are listed), or a value is not a finite F >= 0.
        """
        if like is not None:
            shapes = {name: np.shape(leaf) for name, leaf in flat.items()}
            expected = {name: np.shape(leaf) for name, leaf in flatten_names(like).items()}
            if shapes != expected:
                raise ValueError(_layout_difference(shapes, expected))
            flat = {name: flat[name] for name in expected}
        scaled = {}
        for name, leaf in flat.items():
            values = np.asarray(leaf, np.float64) * GRADIENT_SCALE**2
            scaled[name] = jnp.asarray(values, jnp.result_type(float))
            if not (bool(jnp.isfinite(scaled[name]).all()) and (values >= 0).all()):
                raise ValueError(f"The Fisher information of {name} holds NaN, a negative or a too large value.")
        return cls(unflatten_names(scaled), GRADIENT_SCALE)


@jax.jit
def _count_obstacles(curvature: dict[str, jax.Array], vectors: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """By name, how many values stand in the way of a division; only these counts leave the device."""

    def count(fisher, vector):
        return {
            "vector": jnp.sum(~jnp.isfinite(vector)),
            "curvature": jnp.sum(~(jnp.isfinite(fisher) & (fisher >= 0))),
            "stuck": jnp.sum((fisher == 0) & (vector != 0)),
        }

    return {name: count(fisher, vectors[name]) for name, fisher in curvature.items()}


def _layout_difference(found: dict[str, tuple], expected: dict[str, tuple]) -> str:
    """Lists what differs between two name -> shape tables."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshaped = [
        f"{n} {found[n]}, not {expected[n]}" for n in sorted(found.keys() & expected) if found[n] != expected[n]
    ]
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", misshaped))
        if names
    ]
    return (
        f"The Fisher information does not fit the selected weights ({'; '.join(parts)}). "
        "It was fitted on another model or another weight subset."
    )
