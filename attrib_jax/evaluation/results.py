"""What retrained models showed, in one small file that grows by whole models, and their weights, a file each."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.storage.files import DamagedFileError, StorageError, read_arrays, write_arrays

_log = logging.getLogger(__name__)


class ResultTable:
    """key -> arrays of fixed shapes, in one checksummed file that is replaced whole whenever models are added.

    A file for each model would be thousands; this one is small enough to travel with a model folder.
    """

    def __init__(self, file: str | os.PathLike, fields: Mapping[str, tuple[int, ...]]):
        """Opens the table; `fields` maps a name to the shape of one model's float64 values.

        A damaged file counts as empty: its models are trained again. Raises StorageError where the stored fields are
        others.
        """
        self._file, self.fields = Path(file), {name: tuple(shape) for name, shape in fields.items()}
        self._rows: dict[str, dict[str, np.ndarray]] = {}
        try:
            arrays, header = read_arrays(self._file)
        except FileNotFoundError:
            return
        except DamagedFileError as error:
            _log.warning("%s: its models will be trained again", error)
            return
        stored = {name: array.shape[1:] for name, array in arrays.items()}
        if stored != self.fields:
            raise StorageError(f"{self._file} has the fields {stored}, expected {self.fields}; move it away")
        for place, key in enumerate(header["keys"]):
            self._rows[key] = {name: array[place] for name, array in arrays.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, field: str, keys: Sequence[str]) -> np.ndarray:
        """One field of several models (len(keys), ...); KeyError for a model that is not there."""
        return np.stack([self._rows[key][field] for key in keys])

    def add(self, models: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Adds models, key -> field -> values, and stores all of them; raises ValueError for other fields or shapes."""
        for key, values in models.items():
            row = {name: np.asarray(value, np.float64) for name, value in values.items()}
            given = {name: value.shape for name, value in row.items()}
            if given != self.fields:
                raise ValueError(f"model {key} has the fields {given}; expected {self.fields}")
            self._rows[key] = row
        keys = sorted(self._rows)
        write_arrays(self._file, {name: self.get(name, keys) for name in self.fields}, {"keys": keys})


class KeptModels:
    """key -> a model's weights as float16, one checksummed file each in one folder."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)

    def __contains__(self, key: str) -> bool:
        return self._file(key).exists()

    def read(self, keys: Sequence[str]) -> Any | None:
        """Weights of several models, float32, stacked along a first axis; None, with a warning, if one is damaged."""
        found = []
        for key in keys:
            try:
                arrays, _ = read_arrays(self._file(key))
            except DamagedFileError as error:
                _log.warning("%s: its model will be trained again", error)
                return None
            found.append({name: array.astype(np.float32) for name, array in arrays.items()})
        return unflatten_names({name: np.stack([each[name] for each in found]) for name in found[0]})

    def write(self, keys: Sequence[str], params: Any) -> Any:
        """Keeps the weights of several models, stacked as in `read` -> what `read` gives of them from now on.

        Raises ValueError where a weight is not finite or too large for float16.
        """
        with np.errstate(over="ignore"):
            rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16), params)
        named = flatten_names(rounded)
        for place, key in enumerate(keys):
            arrays = {name: array[place] for name, array in named.items()}
            wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
            if wrong:
                raise ValueError(
                    f"the weights {wrong[0]} of model {key} are NaN or too large for float16: retrain with a lower "
                    "learning_rate, or leave out keep_models"
                )
            write_arrays(self._file(key), arrays, {"key": key})
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
