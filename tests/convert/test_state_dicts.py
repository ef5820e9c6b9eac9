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


def recorded(state: dict[str, np.ndarray], log: list[str]) -> dict[str, LazyTensor]:
    """The state dict as lazy tensors that note their names when they are read."""

    def load(name: str) -> np.ndarray:
        log.append(name)
        return state[name].copy()

    return {name: LazyTensor(x.shape, x.dtype, lambda name=name: load(name)) for name, x in state.items()}


def test_each_tensor_is_read_once_and_none_before_the_names_fit():
    log: list[str] = []
    state = recorded(numpy_state(), log)
    with pytest.raises(ValueError, match="1 missing"):
        load_params({name: state[name] for name in state if name != "conv_in.bias"}, ABSTRACT)
    assert log == []
    load_params(state, ABSTRACT)
    assert sorted(log) == sorted(state)


def test_saving_converts_a_leaf_only_when_it_is_read():
    shapes = state_dict_of(ABSTRACT, np.float16)  # a tree of shapes has no values
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, np.float16) for name, x in numpy_state().items()
    }


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


def test_what_holds_no_floating_point_numbers_is_refused():
    state = numpy_state() | {"conv_in.bias": np.zeros(4, np.int8)}
    with pytest.raises(ValueError, match=r"1 not floating-point:\n  conv_in\.bias: int8"):
        load_params(state, ABSTRACT)


def test_an_overflow_on_saving_is_refused_by_name(tmp_path):
    params = {"conv_in": {"bias": np.array([0, 1e5], np.float32)}}
    with pytest.raises(ValueError, match=r"tensor conv_in\.bias holds a NaN or an infinity as float16"):
        write_weights(state_dict_of(params, np.float16), tmp_path / "x.safetensors")


def compiled(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loading_compiles_nothing(caplog, dtype):
    """A program for every shape took half as much time as the rest of loading, and a fifth of the weights' memory."""
    shapes = {"a": (7, 1), "b": (1, 3, 2, 7), "c": (19,)}  # which no other test has made programs for
    abstract = {
        "a": {"kernel": jax.ShapeDtypeStruct((1, 7), float)},
        "b": {"kernel": jax.ShapeDtypeStruct((2, 7, 3, 1), float)},
        "c": {"scale": jax.ShapeDtypeStruct((19,), float)},
    }
    state = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        load_params(state, abstract, dtype)
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


def test_shapes_are_had_without_compiling(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        abstract = abstract_params(nn.Dense(29), jax.ShapeDtypeStruct((1, 31), jnp.float32))
        assert abstract["kernel"].shape == (31, 29)
        assert compiled(caplog) == []
