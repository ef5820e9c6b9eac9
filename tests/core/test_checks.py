"""What each check accepts, and that its refusal names the argument, its value and what was expected."""

import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.checks import check_choice, check_finite, check_positive, check_range

METHODS = ("unlearn", "influence", "trak", "clip-image")


@pytest.mark.parametrize("value", [1e-30, 3, np.float32(0.5), np.int64(2)])
def test_positive_numbers_are_accepted(value):
    check_positive("stride", value)


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf"), "3", None, True])
def test_others_are_refused(value):
    with pytest.raises(ValueError, match="^stride is .*: expected a finite number greater than 0"):
        check_positive("stride", value)


def test_a_range_includes_its_ends():
    check_range("stride", 1, 1, 1000)
    check_range("stride", 1000, 1, 1000)
    check_positive("stride", np.int32(5), integer=True)


@pytest.mark.parametrize(
    ("name", "value", "bounds", "named"),
    [
        ("stride", 1001, {"low": 1, "high": 1000}, "stride is 1001: expected a number from 1 to 1000"),
        ("damping", -0.1, {"low": 0}, "damping is -0.1: expected a number of at least 0"),
        ("rate", float("nan"), {"high": 1}, "rate is nan: expected a number of at most 1"),
        ("top_k", 3.0, {"low": 1, "integer": True}, "top_k is 3.0: expected a whole number of at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(name, value, bounds, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        check_range(name, value, **bounds)


@pytest.mark.parametrize(
    ("given", "hint"),
    [("unlern", "'unlearn'"), ("TRAK", "'trak'"), ("clip_image", "'clip-image'"), ("zzz", "unlearn, influence")],
)
def test_a_wrong_choice_suggests_the_near_name_and_lists_all(given, hint):
    check_choice("method", "trak", METHODS)
    with pytest.raises(ValueError, match=f"method '{given}'.*{hint}.*clip-image"):
        check_choice("method", given, METHODS)


def test_leaves_that_are_not_finite_are_named_and_counted():
    good = {"a": jnp.ones((2, 3), jnp.bfloat16), "ids": np.arange(3), "key": [np.float64(1.0)]}
    check_finite("params", good)
    bad = {**good, "b": {"kernel": np.array([1.0, np.nan, np.inf])}, "c": jnp.array([-jnp.inf], jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"^params .* b/kernel \(2 of 3\), c \(1 of 1\)"):
        check_finite("params", bad)
    with pytest.raises(ValueError, match=r"^latents .* \(1 of 1\)"):
        check_finite("latents", jnp.nan)
