"""Safetensors files and the leaf-by-leaf checks of loading and saving."""

import os
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attrib_jax.convert.state_dicts import load_params, read_safetensors, state_dict_of, write_safetensors

ABSTRACT = {
    "conv_in": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32), "bias": jax.ShapeDtypeStruct((4,), float)},
    "blocks_0": {"proj": {"kernel": jax.ShapeDtypeStruct((5, 6), jnp.float32)}},
}


def torch_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"conv_in.weight": (4, 2, 3, 3), "conv_in.bias": (4,), "blocks.0.proj.weight": (6, 5)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def numpy_state() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in torch_state().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_read_as_float32(tmp_path, dtype):
    state = torch_state(dtype)
    save_file(state, tmp_path / "x.safetensors")
    params = load_params(read_safetensors(str(tmp_path / "x.safetensors")), ABSTRACT)
    assert params["conv_in"]["kernel"].dtype == jnp.float32
    expected = state["conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv_in"]["kernel"], expected)
    np.testing.assert_array_equal(params["blocks_0"]["proj"]["kernel"], state["blocks.0.proj.weight"].float().numpy().T)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_written_file_is_read_back_to_the_bit(tmp_path, dtype):
    path = str(tmp_path / "x.safetensors")
    params = load_params(numpy_state(), ABSTRACT)
    write_safetensors(state_dict_of(params, dtype), path)
    stored = read_safetensors(path)
    for name, array in numpy_state().items():
        expected = array if dtype is None else array.astype(dtype)
        assert stored[name].dtype == expected.dtype
        np.testing.assert_array_equal(stored[name], expected)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666 & ~umask


def test_mismatches_are_all_listed():
    state = numpy_state()
    state["blocks.0.proj.weight"] = np.zeros((7, 5), np.float32)
    state["extra.bias"] = np.zeros(3, np.float32)
    del state["conv_in.bias"]
    with pytest.raises(ValueError, match="some file does not fit") as error:
        load_params(state, ABSTRACT, source="some file")
    for line in (
        "1 missing:\n  conv_in.bias (4,)",
        "1 unexpected:\n  extra.bias (3,)",
        "1 misshaped:\n  blocks.0.proj.weight: file (7, 5), model (6, 5)",
    ):
        assert line in str(error.value)


def test_a_long_list_is_shortened():
    with pytest.raises(ValueError, match=r"30 unexpected:(?s:.)*and 10 more"):
        load_params(numpy_state() | {f"extra.{i}": np.zeros(1) for i in range(30)}, ABSTRACT)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (np.inf, np.float32), (1e300, np.float64)])
def test_values_that_are_not_finite_are_refused(value, dtype):
    state = numpy_state()
    state["conv_in.bias"] = np.array([0, 0, value, 0], dtype)
    with pytest.raises(ValueError, match=r"some file: tensor conv_in\.bias holds a NaN or an infinity"):
        load_params(state, ABSTRACT, source="some file")


def test_float64_needs_jax_64_bit_types():
    with pytest.raises(ValueError, match="dtype=float64 needs 64-bit types"):
        load_params(numpy_state(), ABSTRACT, dtype=jnp.float64)
    with jax.enable_x64(True):
        assert load_params(numpy_state(), ABSTRACT, dtype=jnp.float64)["conv_in"]["bias"].dtype == jnp.float64


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, None), (1e5, np.float16)])
def test_unwritable_values_are_refused(value, dtype):
    params = {"conv_in": {"bias": np.array([0, value], np.float32)}}
    with pytest.raises(ValueError, match="parameter conv_in/bias holds a NaN or an infinity as float"):
        state_dict_of(params, dtype)


@pytest.mark.parametrize("size", [0, 20, -1])
def test_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "x.safetensors"
    save_file(torch_state(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or no safetensors file"):
        read_safetensors(str(path))


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        read_safetensors(str(tmp_path / "x.safetensors"))
