"""What each check accepts, what it refuses, and that its message says enough to act on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.checks import check_choice, check_finite, check_positive, check_range

METHODS = ("unlearn", "influence", "trak", "clip-image")


@pytest.mark.parametrize("value", [1e-30, 3, np.float32(0.5), np.int64(2)])
def test_positive_accepts(value):
    check_positive("stride", value)


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf"), "3", None, True])
def test_positive_refuses(value):
    with pytest.raises(ValueError, match=r"^stride is .*: expected a finite number greater than 0"):
        check_positive("stride", value)


def test_positive_whole_number():
    check_positive("stride", np.int32(5), integer=True)
    with pytest.raises(ValueError, match=r"stride is 2\.5: expected a whole number greater than 0"):
        check_positive("stride", 2.5, integer=True)


def test_range_includes_its_ends():
    check_range("stride", 1, 1, 1000)
    check_range("stride", 1000, 1, 1000)
    with pytest.raises(ValueError, match=r"stride is 1001: expected a number from 1 to 1000"):
        check_range("stride", 1001, 1, 1000)
    with pytest.raises(ValueError, match=r"damping is -0.1: expected a number of at least 0"):
        check_range("damping", -0.1, low=0)
    with pytest.raises(ValueError, match=r"rate is nan: expected a number of at most 1"):
        check_range("rate", float("nan"), high=1)
    with pytest.raises(ValueError, match=r"top_k is 3.0: expected a whole number of at least 1"):
        check_range("top_k", 3.0, low=1, integer=True)


@pytest.mark.parametrize(("given", "meant"), [("unlern", "unlearn"), ("TRAK", "trak"), ("clip_image", "clip-image")])
def test_choice_suggests_the_near_name(given, meant):
    with pytest.raises(ValueError) as caught:
        check_choice("method", given, METHODS)
    assert str(caught.value) == (
        f"unknown method '{given}': did you mean '{meant}'? Known: unlearn, influence, trak, clip-image."
    )


def test_choice_without_a_near_name_lists_all():
    check_choice("method", "trak", METHODS)
    with pytest.raises(ValueError) as caught:
        check_choice("method", "zzz", METHODS)
    assert str(caught.value) == "unknown method 'zzz': Known: unlearn, influence, trak, clip-image."


def test_finite_names_the_leaves():
    good = {"a": jnp.ones((2, 3), jnp.bfloat16), "ids": np.arange(3), "key": [np.float64(1.0)]}
    check_finite("params", good)
    bad = {**good, "b": {"kernel": np.array([1.0, np.nan, np.inf])}, "c": jnp.array([-jnp.inf], jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"^params has .* b/kernel \(2 of 3\), c \(1 of 1\)\."):
        check_finite("params", bad)
    with pytest.raises(ValueError, match=r"latents .* the array \(1 of 1\)"):
        check_finite("latents", jax.numpy.nan)
