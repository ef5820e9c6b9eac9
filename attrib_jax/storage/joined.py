"""Arrays on disk, in several parts or to be scaled, of which only what is indexed is read.

Kept by hand: dask arrays would do the same, with a scheduler and a graph for each read of a batch.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class JoinedArray:
    """Parts one after the other along the first axis, read-only; indexing copies the selection into memory.

    Takes an integer, a slice, or integer arrays (n,) as the first index, alone or followed by further indices, each an
    integer or an (n,) array: `joined[rows, flips]` as in numpy. `np.asarray(joined)` reads the whole array.
    """

    def __init__(
        self, lengths: Sequence[int], part: Callable[[int], Any], shape: tuple[int, ...], dtype: np.dtype | type
    ):
        """`part(i)` gives part i, an array (lengths[i], *shape), when it is needed; it may keep or forget it."""
        self._starts = np.array(list(itertools.accumulate(lengths, initial=0)), np.int64)
        self._part = part
        self.shape = (int(self._starts[-1]), *shape)
        self.dtype = np.dtype(dtype)

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> "JoinedArray":
        """Joins arrays (or joined arrays) whose rows have one shape, in the widest of their dtypes.

        Raises ValueError where the shapes of rows differ.
        """
        shapes = {tuple(array.shape[1:]) for array in arrays}
        if len(shapes) != 1:
            raise ValueError(f"the parts have rows of shapes {sorted(shapes)}; expected one shape")
        dtype = np.result_type(*(array.dtype for array in arrays))
        return cls([array.shape[0] for array in arrays], list(arrays).__getitem__, shapes.pop(), dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice):
            first = np.arange(len(self))[first]
        rows = np.asarray(first)
        if not np.issubdtype(rows.dtype, np.integer):
            raise IndexError(f"the first index has dtype {rows.dtype}; expected integers or a slice")
        if rows.size and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"index {rows.min()} to {rows.max()} is outside {len(self)} rows")
        if rows.ndim == 0:
            return self[(rows[None], *(np.asarray(other)[None] for other in rest))][0]
        rows = np.where(rows < 0, rows + len(self), rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        # An empty selection still has to know its shape.
        result = np.empty((len(rows), *self.shape[1 + len(rest) :]), self.dtype)
        for number in np.unique(parts):
            members = parts == number
            others = (other[members] if np.ndim(other) else other for other in map(np.asarray, rest))
            result[members] = self._part(int(number))[(rows[members] - self._starts[number], *others)]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a joined array is on disk: it cannot be converted without a copy. Leave out copy=False.")
        return np.asarray(self[:], dtype)


class ScaledArray:
    """An array times a factor, multiplied when it is read -> float32; takes the indices of the array itself."""

    def __init__(self, array: Any, factor: float):
        self._array, self._factor = array, np.float32(factor)
        self.shape, self.dtype = tuple(array.shape), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._array[index], np.float32) * self._factor


class PackedRows:
    """Vectors (..., k) that `pack_rows` packed, unpacked when they are read -> float32; takes what the arrays take."""

    def __init__(self, packed: Any, scale: Any):
        """`packed` (N, ..., k) and `scale` (N, ...), arrays or arrays on disk."""
        self._packed, self._scale = packed, scale
        self.shape, self.dtype = tuple(packed.shape), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The vectors of `rows`, an index of the first axis alone."""
        return np.asarray(self._packed[rows], np.float32) * np.asarray(self._scale[rows], np.float32)[..., None]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("packed rows are converted when they are read. Leave out copy=False.")
        return np.asarray(self[:], dtype)


def pack_rows(values: np.ndarray, dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (..., k), in float16 or int8, and a float32 scale (...) for each, by which `PackedRows` multiplies.

    A vector's largest magnitude becomes 1 in float16 (the others keep 11 bits), or 127 in int8, where each number is
    rounded to the nearest of 255 values: an error of at most 1/254 of the largest. A vector of zeros stays one.

    Raises ValueError where a value is NaN or infinite.
    """
    dtype = np.dtype(dtype)
    largest = np.abs(values).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("values are NaN or infinite: expected finite numbers")
    steps = np.iinfo(dtype).max if dtype.kind == "i" else 1
    scale = (largest / steps).astype(np.float32)
    divided = values / np.where(scale > 0, scale, 1)[..., None]
    if dtype.kind == "i":
        divided = np.clip(np.rint(divided), -steps, steps)
    return divided.astype(dtype), scale
