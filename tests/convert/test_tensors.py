"""Tensors that are read late."""

import ml_dtypes
import numpy as np
import pytest

from attrib_jax.convert.weights.tensors import LazyTensor, dtype_of


class Source:
    """An array that notes that it was read."""

    def __init__(self, array):
        self.array, self.is_read = array, False

    def load(self):
        self.is_read = True
        return self.array.copy()


def test_nothing_is_read_before_it_is_asked_for():
    source = Source(np.arange(12, dtype=np.float32).reshape(6, 2))
    tensor = LazyTensor((6, 2), np.float32, source.load)
    derived = tensor.map(np.transpose, (2, 6)).map(lambda x: x.astype(np.float16), dtype=np.float16)
    parts = tensor.split(3)
    assert (tensor.ndim, tensor.nbytes, derived.shape, derived.dtype) == (2, 48, (2, 6), np.float16)
    assert [part.shape for part in parts] == [(2, 2)] * 3
    assert not source.is_read
    np.testing.assert_array_equal(derived.read(), source.array.T.astype(np.float16))
    np.testing.assert_array_equal(np.concatenate([np.asarray(part) for part in parts]), source.array)


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_arrays_come_back_contiguous_and_in_their_shape(shape):
    array = np.full(shape, 2.0, np.float32)
    read = LazyTensor.of(array).map(np.transpose, shape[::-1]).read()
    assert read.flags.c_contiguous and read.shape == shape[::-1]
    np.testing.assert_array_equal(read, array.T)


def test_numpy_converts_it_like_an_array():
    tensor = LazyTensor.of(np.array([1.5, 2.5], np.float64))
    assert np.asarray(tensor, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(tensor), [1.5, 2.5])
    assert LazyTensor.of(tensor) is tensor


@pytest.mark.parametrize("kwargs", [{"shape": (3,)}, {"dtype": np.int32}])
def test_a_function_that_gives_something_else_than_declared_is_refused(kwargs):
    tensor = LazyTensor.of(np.zeros(2, np.float32)).map(lambda x: x, **kwargs)
    with pytest.raises(ValueError, match=r"\(2,\) and float32"):
        tensor.read()


@pytest.mark.parametrize(("shape", "parts"), [((), 1), ((4, 2), 3), ((4, 2), 0)])
def test_uneven_parts_are_refused(shape, parts):
    with pytest.raises(ValueError, match=f"parts={parts}"):
        LazyTensor.of(np.zeros(shape)).split(parts)


def test_types_by_their_pytorch_names():
    assert dtype_of("bfloat16") == ml_dtypes.bfloat16 and dtype_of("bool") == np.bool_
    with pytest.raises(TypeError):
        dtype_of("quint8")
