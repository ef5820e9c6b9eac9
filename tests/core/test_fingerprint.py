"""Fingerprints of parameter trees, files and settings: the documented digests, and any change shows."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.fingerprint import (
    array_digest,
    digest,
    file_digest,
    files_digest,
    json_digest,
    name_hash,
    params_fingerprint,
)

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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digests_of_texts_files_and_settings_are_sha256(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_text(name * 3)
    listing = f"b {_sha256(b'bbb')}\na {_sha256(b'aaa')}\n".encode()
    mixed = ("é", b"\0", np.array([[1, 2]], np.int16).T)
    found = {
        digest("é"): "é".encode(),
        digest(iter(mixed)): "é".encode() + b"\0\1\0\2\0",
        json_digest({"b": [1], "a": None}): json.dumps({"a": None, "b": [1]}).encode(),
        file_digest(tmp_path / "a"): b"aaa",
        files_digest([tmp_path / "b", tmp_path / "a"]): listing,
        array_digest(np.float32([1])): b" (1,) float32\n" + np.float32([1]).tobytes(),
    }
    assert list(found) == [_sha256(content) for content in found.values()]
    assert name_hash("fisher") == int(_sha256(b"fisher")[:8], 16)
