"""State dicts and parameter trees: the checks by name, and the conversion leaf by leaf."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.state_dicts import abstract_params, load_params, state_dict_of
from attrib_jax.convert.weights.tensors import LazyTensor

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


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_read_as_float32(tmp_path, dtype, save):
    state = torch_state(dtype)
    save(state, tmp_path / "x.weights")
    params = load_params(open_weights(tmp_path / "x.weights"), ABSTRACT)
    assert params["conv_in"]["kernel"].dtype == jnp.float32
    expected = state["conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv_in"]["kernel"], expected)
    np.testing.assert_array_equal(params["blocks_0"]["proj"]["kernel"], state["blocks.0.proj.weight"].float().numpy().T)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_written_file_is_read_back_to_the_bit(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    write_weights(state_dict_of(load_params(numpy_state(), ABSTRACT), dtype), path)
    stored = open_weights(path)
    for name, array in numpy_state().items():
        expected = array if dtype is None else array.astype(dtype)
        assert stored[name].dtype == expected.dtype
        np.testing.assert_array_equal(stored[name].read(), expected)


def test_none_is_read_before_the_names_fit():
    def load():
        raise AssertionError("read")

    state = {name: LazyTensor(x.shape, x.dtype, load) for name, x in numpy_state().items() if name != "conv_in.bias"}
    with pytest.raises(ValueError, match=r"1 missing:\n  conv_in\.bias"):
        load_params(state, ABSTRACT)
    shapes = state_dict_of(ABSTRACT, np.float16)  # a tree of shapes has no values
    expected = {name: (x.shape, np.float16) for name, x in numpy_state().items()}
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == expected


BIAS = "conv_in.bias"


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({BIAS: None}, [f"1 missing:\n  {BIAS} (4,)"]),
        ({"extra.bias": np.zeros(3)}, ["1 unexpected:\n  extra.bias (3,)"]),
        (
            {"blocks.0.proj.weight": np.zeros((7, 5))},
            ["1 misshaped:\n  blocks.0.proj.weight: file (7, 5), model (6, 5)"],
        ),
        ({BIAS: None, "x": np.zeros(3), "y": np.zeros(3)}, ["1 missing", "2 unexpected"]),
        ({f"extra.{i}": np.zeros(1) for i in range(30)}, ["30 unexpected", "and 10 more"]),
        ({BIAS: np.zeros(4, np.int8)}, [f"1 not floating-point:\n  {BIAS}: int8"]),
        ({BIAS: np.array([0, 0, np.nan, 0], np.float32)}, [f"tensor {BIAS} holds a NaN"]),
        ({BIAS: np.array([0, 0, np.inf, 0], np.float32)}, [f"tensor {BIAS} holds a NaN or an infinity"]),
        ({BIAS: np.array([0, 0, 1e300, 0])}, [f"tensor {BIAS} holds a NaN or an infinity"]),
    ],
)
def test_mismatches_and_false_values_are_all_listed(changes, lines):
    state = {name: x for name, x in (numpy_state() | changes).items() if x is not None}
    with pytest.raises(ValueError, match="some file") as error:
        load_params(state, ABSTRACT, source="some file")
    assert all(line in str(error.value) for line in lines)


def test_float64_needs_jax_64_bit_types():
    with pytest.raises(ValueError, match="dtype=float64"):
        load_params(numpy_state(), ABSTRACT, dtype=jnp.float64)
    with jax.enable_x64(True):
        assert load_params(numpy_state(), ABSTRACT, dtype=jnp.float64)["conv_in"]["bias"].dtype == jnp.float64


def compiled(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loading_compiles_nothing(caplog, dtype):
    """A program for every shape took half the time of the rest of loading, and a fifth of the weights' memory."""
    shapes = {"a": (7, 1), "b": (1, 3, 2, 7), "c": (19,)}  # which no other test has made programs for
    abstract = {
        "a": {"kernel": jax.ShapeDtypeStruct((1, 7), float)},
        "b": {"kernel": jax.ShapeDtypeStruct((2, 7, 3, 1), float)},
        "c": {"scale": jax.ShapeDtypeStruct((19,), float)},
    }
    state = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        load_params(state, abstract, dtype)
        assert abstract_params(nn.Dense(29), jax.ShapeDtypeStruct((1, 31), jnp.float32))["kernel"].shape == (31, 29)
        assert compiled(caplog) == []
        jax.jit(lambda x: x + 1)(np.ones(23))
        assert len(compiled(caplog)) == 1  # what the test looks for is there when something is compiled


def test_loaded_parameters_are_no_views_of_the_callers_arrays():
    buffer = np.empty(20, np.float32)
    for start in range(16):  # one of them is aligned so that JAX would take it without a copy
        bias = buffer[start : start + 4]
        bias[:] = 1
        params = load_params(numpy_state() | {"conv_in.bias": bias}, ABSTRACT)
        bias[:] = 5
        np.testing.assert_array_equal(params["conv_in"]["bias"], np.ones(4))
