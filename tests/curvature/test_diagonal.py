"""Solving with a diagonal curvature, its checks, and its flat form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.curvature import Diagonal
from attrib_jax.curvature.diagonal import GRADIENT_SCALE

NAME = "block/attn2/to_k/kernel"


def nest(values, dtype=jnp.float32):
    return {"block": {"attn2": {"to_k": {"kernel": jnp.asarray(values, dtype)}}}}


def leaf(tree):
    return np.asarray(tree["block"]["attn2"]["to_k"]["kernel"])


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, GRADIENT_SCALE])
def test_solve_divides_elementwise(damping, scale):
    rng = np.random.default_rng(0)
    fisher, vector = rng.uniform(0.1, 2, size=(4, 3)), rng.normal(size=(4, 3))
    curvature = Diagonal(nest(fisher * scale**2), scale)
    solved = jax.jit(lambda c, v: c.solve(v, damping))(curvature, nest(vector))
    np.testing.assert_allclose(leaf(solved), vector / (fisher + damping), rtol=1e-6)


def test_zero_over_zero_is_zero_and_other_divisions_by_zero_are_named():
    curvature = Diagonal(nest([[0.0, 2.0, 0.0]]))
    vector = nest([[0.0, 1.0, 0.0]])
    curvature.check_solvable(vector)
    np.testing.assert_array_equal(leaf(curvature.solve(vector)), [[0, 0.5, 0]])
    vector = nest([[0.0, 1.0, 3.0]])
    assert np.isinf(leaf(curvature.solve(vector))[0, 2])
    with pytest.raises(ValueError, match=f"{NAME} is 0 for 1 of 3 values"):
        curvature.check_solvable(vector)
    curvature.check_solvable(vector, damping=0.5)
    np.testing.assert_array_equal(leaf(curvature.solve(vector, 0.5)), np.float32([[0, 0.4, 6]]))


def check(fisher, gradient, **options):
    return lambda: Diagonal(nest(fisher)).check_solvable(nest(gradient), **options)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (check([1.0], [jnp.nan]), f"gradient of {NAME} .*NaN"),
        *((check([value], [1.0]), f"Fisher information of {NAME}") for value in (-1.0, np.inf, np.nan)),
        (lambda: Diagonal.from_flat({NAME: np.array([-1.0])}), f"Fisher information of {NAME}"),
        (lambda: Diagonal.from_flat({NAME: np.array([np.nan])}), f"Fisher information of {NAME}"),
        (lambda: Diagonal.from_flat({"other": np.ones(1)}, like=nest([1.0])), f"missing: {NAME}; .*: other"),
        (check([1.0], [1.0], damping=-1), "damping is -1"),
        (check([1.0], [1.0, 2.0]), rf"{NAME} \(1,\), not \(2,\)"),
    ],
)
def test_bad_values_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_flat_form_is_exact_both_ways():
    values = np.float32([[1.5e-38, 1.0], [3.1e-7, 7.0e30]])
    curvature = Diagonal(nest(values), GRADIENT_SCALE)
    flat = curvature.to_flat()
    assert flat[NAME].dtype == np.float64
    np.testing.assert_array_equal(flat[NAME], values.astype(np.float64) / 2.0**64)
    back = Diagonal.from_flat(flat, like=nest(values))
    np.testing.assert_array_equal(leaf(back.tree), values)
    assert back.gradient_scale == GRADIENT_SCALE
