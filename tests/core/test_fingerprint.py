"""Fingerprints of parameter trees."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.fingerprint import params_fingerprint

TREE = {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.array([1, 2], np.int32)}


def test_it_is_the_documented_digest():
    text = b"['a'] (2,) int32\n" + TREE["a"].tobytes()
    text += b"['b']['kernel'] (2, 3) float32\n" + TREE["b"]["kernel"].tobytes()
    assert params_fingerprint(TREE) == hashlib.sha256(text).hexdigest()


def test_key_order_device_layout_and_byte_order_do_not_matter():
    kernel = TREE["b"]["kernel"]
    expected = params_fingerprint(TREE)
    assert params_fingerprint({"a": jnp.asarray(TREE["a"]), "b": {"kernel": jnp.asarray(kernel)}}) == expected
    assert params_fingerprint({"a": TREE["a"].astype(">i4"), "b": {"kernel": np.asfortranarray(kernel)}}) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"b": {"kernel": np.nextafter(TREE["b"]["kernel"], 9, dtype=np.float32)}, "a": TREE["a"]},
        {"b": {"kernel": TREE["b"]["kernel"].reshape(3, 2)}, "a": TREE["a"]},
        {"b": {"kernel": TREE["b"]["kernel"].view(np.int32)}, "a": TREE["a"]},
        {"b": {"bias": TREE["b"]["kernel"]}, "a": TREE["a"]},
        {"b": TREE["b"]},
    ],
)
def test_any_change_shows(other):
    assert params_fingerprint(other) != params_fingerprint(TREE)


def test_scalars_empty_arrays_and_bfloat16_are_hashed():
    trees = [{"x": np.float32(1)}, {"x": np.zeros((0, 2))}, {"x": jnp.ones(3, jnp.bfloat16)}]
    assert len({params_fingerprint(tree) for tree in trees}) == 3
