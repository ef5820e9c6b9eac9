"""Tensors on disk: shape and type are known, the data is read when it is asked for."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

# Types that numpy does not have, by the name that PyTorch gives them.
EXTRA_TYPES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


class LazyTensor:
    """An array that is read from its file, or computed from others, each time that `read` is called.

    Args:
      shape: shape of the array.
      dtype: dtype of the array; bfloat16 and float8 are those of `ml_dtypes`.
      load: makes the array; called once for every `read`. It must give a new array each time.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, load: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._load = load

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """`tensor` itself, or a numpy or JAX array as a LazyTensor (whose `read` gives the array, not a copy)."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return cls(tensor.shape, tensor.dtype, lambda: np.asarray(tensor))

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the array that `read` gives."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, C-contiguous.

        Raises ValueError if the file has been damaged since it was opened, or a `map` function gave another shape or
        type than was declared.
        """
        array = np.asarray(self._load(), order="C")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"expected a tensor of shape {self.shape} and type {self.dtype.name}, got {array.shape} and "
                f"{array.dtype.name}; declare what the function of map() returns"
            )
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def map(
        self, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None, dtype: Any = None
    ) -> LazyTensor:
        """The tensor whose `read` gives `function(self.read())`, of this `shape` and `dtype` (None: unchanged)."""
        return LazyTensor(
            self.shape if shape is None else shape,
            self.dtype if dtype is None else dtype,
            lambda: function(self.read()),
        )

    def split(self, parts: int | Sequence[int]) -> tuple[LazyTensor, ...]:
        """The tensor cut along axis 0, as a fused query, key and value projection is.

        `parts` is how many of equal size, or the sizes relative to each other.

        Raises ValueError if axis 0 cannot be cut so.
        """
        shares = [1] * parts if isinstance(parts, int) else list(parts)
        if not shares or min(shares) < 1 or not self.shape or self.shape[0] % sum(shares):
            raise ValueError(f"a tensor of shape {self.shape} cannot be cut along axis 0 into parts={parts}")
        unit = self.shape[0] // sum(shares)
        ends = [unit * end for end in itertools.accumulate(shares)]

        def block(x: np.ndarray, start: int, end: int) -> np.ndarray:
            return x[start:end].copy()

        return tuple(
            self.map(functools.partial(block, start=start, end=end), (end - start, *self.shape[1:]))
            for start, end in zip([0, *ends], ends)
        )

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype.name})"


# What a state dict holds: a tensor on disk, or an array in memory.
Tensor = LazyTensor | np.ndarray


def dtype_of(name: str) -> np.dtype:
    """The numpy type that PyTorch and numpy call `name` (as in "float32", "bool", "bfloat16").

    Raises TypeError for a type that numpy and ml_dtypes do not have.
    """
    return np.dtype(getattr(ml_dtypes, name) if name in EXTRA_TYPES else name)
