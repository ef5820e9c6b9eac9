"""What retrained models showed, kept in one small file that grows by whole models."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

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
