"""Files of feature mappings: every form, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from attrib_jax.attribution.feature_head import load_head

WEIGHT = np.array([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], np.float32)
BIAS = np.array([10.0, 20.0], np.float32)


def write(path, form, **arrays):
    if form == "npz":
        np.savez(path, **arrays)
    elif form == "safetensors":
        save_file(arrays, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("form", ["npz", "safetensors", "pth"])
def test_features_are_mapped_as_torch_maps_them(tmp_path, form):
    features = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 0.5]])
    head = load_head(write(tmp_path / f"head.{form}", form, **{"mapper.weight": WEIGHT, "mapper.bias": BIAS}), 3)
    np.testing.assert_array_equal(head.training(features), [[13, 22], [12, 21.5]])
    assert head.training is head.query
    plain = load_head(write(tmp_path / f"plain.{form}", form, weight=WEIGHT), 3)
    np.testing.assert_array_equal(plain.query(features), [[3, 2], [2, 1.5]])


def test_the_published_files_have_a_mapping_for_either_side(tmp_path):
    sides = {"real_mapper": (WEIGHT, BIAS), "synth_mapper": (2 * WEIGHT, -BIAS)}
    state = {
        name: dict(zip(("weight", "bias"), map(torch.from_numpy, arrays), strict=True))
        for name, arrays in sides.items()
    }
    torch.save(state, tmp_path / "tuned.pth")
    head = load_head(tmp_path / "tuned.pth", 3)
    features = np.array([[1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(head.training(features), [[13, 22]])
    np.testing.assert_array_equal(head.query(features), [[-4, -16]])


@pytest.mark.parametrize(
    ("arrays", "width", "named"),
    [
        ({"w": WEIGHT}, 4, r"\(2, 3\).*\(out, 4\)"),
        ({"w": WEIGHT, "b": np.zeros(3, np.float32)}, 3, "bias"),
        ({"w": WEIGHT, "v": WEIGHT}, 3, r"\(out, 3\)"),
        ({"b": BIAS}, 3, "matrix"),
        ({"w": WEIGHT * np.nan}, 3, "NaN"),
        ({"real_mapper.weight": WEIGHT}, 3, "real_mapper"),
        ({"real_mapper.w": WEIGHT, "synth_mapper.w": WEIGHT, "w": WEIGHT}, 3, "synth_mapper"),
        ({"real_mapper.w": WEIGHT, "synth_mapper.w": WEIGHT[:1]}, 3, "one width"),
        ({"w": np.array([print], object)}, 3, "head.npz.*damaged"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, width, named):
    with pytest.raises(ValueError, match=named):
        load_head(write(tmp_path / "head.npz", "npz", **arrays), width)


def test_missing_and_damaged_files(tmp_path):
    for name in ("a.npz", "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            load_head(tmp_path / name, 3)
    (tmp_path / "cut.npz").write_bytes(write(tmp_path / "head.npz", "npz", w=WEIGHT).read_bytes()[:60])
    with pytest.raises(ValueError, match="cut.npz.*damaged"):
        load_head(tmp_path / "cut.npz", 3)
