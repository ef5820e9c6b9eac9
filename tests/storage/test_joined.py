"""Arrays in parts: every way of indexing against one numpy array."""

import numpy as np
import pytest

from attrib_jax.storage.joined import JoinedArray, PackedRows, ScaledArray, pack_rows

WHOLE = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
PARTS = [WHOLE[:4], WHOLE[4:4], WHOLE[4:9], WHOLE[9:]]


@pytest.fixture
def joined():
    return JoinedArray.of(PARTS)


@pytest.mark.parametrize(
    "index",
    [
        0,
        np.int64(-1),
        slice(None),
        slice(2, 10, 3),
        slice(5, 5),
        np.array([10, 0, 3, 3, 4]),
        np.array([], np.int64),
        np.array([-1, -11]),
        (np.array([10, 0, 4]), np.array([1, 0, 1])),
        (np.array([10, 0, 4]), 1),
        (3, 1),
        (np.array([8, 9]), np.array([0, 1]), np.array([2, 0])),
        (slice(3, 6), 0),
    ],
)
def test_indexing_is_numpys(joined, index):
    assert joined.shape == WHOLE.shape and joined.ndim == 3 and len(joined) == 11 and joined.nbytes == WHOLE.nbytes
    expected = WHOLE[index]
    np.testing.assert_array_equal(joined[index], expected)
    assert joined[index].shape == expected.shape and joined[index].dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(joined, np.float64), WHOLE.astype(np.float64), strict=True)


def test_only_the_parts_asked_for_are_opened():
    opened = []
    joined = JoinedArray(
        [4, 7], lambda number: (opened.append(number), [WHOLE[:4], WHOLE[4:]][number])[1], (2, 3), "f4"
    )
    joined[np.array([5, 10])]
    assert opened == [1]


@pytest.mark.parametrize("index", [11, -12, np.array([0, 11]), np.array([0.5])])
def test_wrong_indices(joined, index):
    with pytest.raises(IndexError, match="11|integers"):
        joined[index]


def test_parts_of_different_shapes_are_refused_and_dtypes_widened():
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\), \(3, 2\)\]"):
        JoinedArray.of([WHOLE, WHOLE.transpose(0, 2, 1)])
    assert JoinedArray.of([WHOLE, WHOLE.astype(np.float16)]).dtype == np.float32


def test_scaled_array_multiplies_what_is_read():
    scaled = ScaledArray(WHOLE.astype(np.float16), 0.5)
    rows, flips = np.array([3, 1]), np.array([0, 1])
    np.testing.assert_array_equal(scaled[rows, flips], WHOLE.astype(np.float16)[rows, flips].astype(np.float32) * 0.5)
    assert scaled.shape == WHOLE.shape and scaled[rows, flips].dtype == np.float32 == scaled.dtype


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("int8", 1 / 254)])
def test_packed_rows_are_as_near_as_their_type_allows_whatever_their_scale(dtype, error):
    values = WHOLE * np.float32(10.0) ** np.arange(-16, 6, 2, dtype=np.float32)[:, None, None]
    values[3, 1] = 0
    packed, scale = pack_rows(values, dtype)
    assert packed.dtype == dtype and scale.shape == (11, 2) and scale.dtype == np.float32
    rows = PackedRows(JoinedArray.of([packed[:4], packed[4:]]), scale)
    assert rows.shape == values.shape and len(rows) == 11
    assert (np.abs(np.asarray(rows) - values) <= 1.01 * error * np.abs(values).max(axis=-1, keepdims=True)).all()
    np.testing.assert_array_equal(rows[2:5], np.asarray(rows)[2:5])
    with pytest.raises(ValueError, match="NaN or infinite"):
        pack_rows(np.array([[1.0, np.nan]]), dtype)
