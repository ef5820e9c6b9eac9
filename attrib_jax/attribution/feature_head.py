"""Linear mappings of a tower's features, such as the fine-tuned ones of AbC (METHOD.md section 7)."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.convert.weights.files import open_weights

# The two of AbC's files: real images are training ones and exemplars, synthesised ones are queries.
_TRAINING, _QUERY = "real_mapper.", "synth_mapper."


class LinearMap(NamedTuple):
    """weight: (out, in), as torch.nn.Linear has it; bias: (out,); both float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (..., in) -> mapped features (..., out) float64."""
        return np.asarray(features, np.float64) @ self.weight.T + self.bias


class FeatureHead(NamedTuple):
    """training: the mapping of training images' features; query: that of queries'; to one width."""

    training: LinearMap
    query: LinearMap


def load_head(path: str | os.PathLike, width: int) -> FeatureHead:
    """Reads a feature head.

    The file holds one mapping for both sides, a matrix (out, in) and a bias (out,) or none, under any names; or two,
    `real_mapper.*` of training images and `synth_mapper.*` of queries, as AbC's are published.

    Args:
      path: an `.npz`, safetensors or PyTorch file.
      width: of the features that it is to map, the matrices' second axis.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds anything else, of another width, or no finite numbers.
    """
    path = os.fspath(path)
    arrays = {name: np.asarray(array) for name, array in _open(path).items()}
    sides = [
        {name: array for name, array in arrays.items() if name.startswith(prefix)} for prefix in (_TRAINING, _QUERY)
    ]
    if not any(sides):
        both = _linear_map(path, arrays, width)
        return FeatureHead(both, both)
    if len(arrays) != sum(map(len, sides)):
        raise ValueError(f"feature head {path} holds {_shapes(arrays)}; expected {_TRAINING}* and {_QUERY}* alone")
    head = FeatureHead(*(_linear_map(path, side, width) for side in sides))
    if len(head.training.bias) != len(head.query.bias):
        raise ValueError(f"feature head {path} holds {_shapes(arrays)}; expected two mappings to one width")
    return head


def _linear_map(path: str, arrays: Mapping[str, np.ndarray], width: int) -> LinearMap:
    matrices = [array for array in arrays.values() if array.ndim == 2]
    vectors = [array for array in arrays.values() if array.ndim == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(arrays) != len(matrices) + len(vectors):
        raise ValueError(
            f"feature head {path} holds {_shapes(arrays)}; expected one matrix (out, {width}), and a bias or none, or "
            f"such a pair under {_TRAINING}* and another under {_QUERY}*"
        )
    weight = matrices[0].astype(np.float64)
    bias = vectors[0].astype(np.float64) if vectors else np.zeros(len(weight))
    if weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"feature head {path} holds {_shapes(arrays)}; the tower's features have width {width}, so a matrix (out, "
            f"{width}) was expected, with a bias (out,). Give the head that was trained with this tower."
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError(f"feature head {path} holds a NaN or an infinity; copy it again")
    return LinearMap(weight, bias)


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _open(path: str) -> Mapping[str, Any]:
    if not path.endswith(".npz"):
        return open_weights(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"feature head {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile, zlib and numpy answer damaged files with exceptions of many types
        raise ValueError(f"feature head {path} is damaged or no npz file ({error}); copy it again") from error
