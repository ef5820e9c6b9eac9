"""Per-row results in checksummed chunks: what is written stays written, and a resumed run computes only the rest.

Kept by hand: zarr and array_record, which store arrays in chunks, neither check a chunk's content nor tell a chunk that
is missing from one that holds the fill value.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.files import (
    DamagedFileError,
    StorageError,
    make_folder,
    map_arrays,
    read_arrays,
    storage_errors,
    write_arrays,
    write_json,
)
from attrib_jax.storage.joined import JoinedArray

_log = logging.getLogger(__name__)

_LAYOUT = "layout.json"


class ChunkStore:
    """Arrays of `num_rows` rows, written chunk by chunk in any order into `<stage_path>/<name>/`.

    Each chunk is one safetensors file with its row range and a checksum, written atomically: after a kill or a full
    disk a chunk is there whole or not at all. Chunks that are truncated or changed count as missing.
    """

    def __init__(
        self,
        stage_path: str | os.PathLike,
        fields: Mapping[str, tuple[tuple[int, ...], Any]],
        num_rows: int,
        rows_per_chunk: int,
        name: str = "chunks",
    ):
        """Opens the store, creating it if absent.

        Args:
          stage_path: folder of the stage.
          fields: name -> (shape of one row, dtype); every dtype that numpy knows by itself.
          num_rows: number of rows, at least 1.
          rows_per_chunk: rows of a chunk, at least 1; the last chunk may be shorter. It changes no result: a store that
            exists keeps the value that it was created with, so take row ranges from `rows`.
          name: folder in the stage, for stages with several stores.

        Raises:
          ValueError: a number is below 1.
          StorageError: the store was made with other fields or another number of rows, or the folder cannot be used.
        """
        for argument, value in (("num_rows", num_rows), ("rows_per_chunk", rows_per_chunk)):
            if value < 1:
                raise ValueError(f"{argument} is {value}: expected at least 1")
        self.path = make_folder(Path(stage_path) / name)
        self.fields = {field: (tuple(shape), np.dtype(dtype)) for field, (shape, dtype) in fields.items()}
        self.num_rows = num_rows
        self.rows_per_chunk = self._agree_on_layout(rows_per_chunk)

    @property
    def num_chunks(self) -> int:
        """Number of chunks, written or not."""
        return -(-self.num_rows // self.rows_per_chunk)

    def rows(self, index: int) -> slice:
        """The rows that chunk `index` holds."""
        if not 0 <= index < self.num_chunks:
            raise ValueError(f"chunk index is {index}: expected 0 to {self.num_chunks - 1}")
        start = index * self.rows_per_chunk
        return slice(start, min(start + self.rows_per_chunk, self.num_rows))

    def pending_chunks(self, checked_bytes: int = 2**31) -> list[int]:
        """The chunks that are still to be computed, rising; host 0 looks for all hosts.

        In a store of up to `checked_bytes` they are the absent and the damaged ones, each file being read and checked.
        In a larger one they are the absent ones, so that terabytes can be opened at once; `array` then checks a chunk
        when it first uses it.
        """
        row_bytes = sum(dtype.itemsize * math.prod(shape) for shape, dtype in self.fields.values())
        check = self.num_rows * row_bytes <= checked_bytes

        def is_pending(index: int) -> bool:
            if not self._file(index).exists():
                return True
            try:
                if check:
                    self.read(index)
                return False
            except DamagedFileError as error:
                _log.warning("%s: it will be computed again", error)
                return True

        return run_on_host0(lambda: [index for index in range(self.num_chunks) if is_pending(index)])

    def write(self, index: int, arrays: Mapping[str, Any]) -> None:
        """Stores chunk `index`; `arrays` has every field, (rows of the chunk, *row shape) in the field's dtype.

        Raises ValueError where names, shapes or dtypes differ from the fields, StorageError where the disk refuses.
        """
        rows = self.rows(index)
        arrays = {field: np.asarray(array) for field, array in arrays.items()}
        expected = {field: ((rows.stop - rows.start, *shape), dtype) for field, (shape, dtype) in self.fields.items()}
        given = {field: (array.shape, array.dtype) for field, array in arrays.items()}
        if given != expected:
            raise ValueError(f"chunk {index} of {self.path} has {_show(given)}: expected {_show(expected)}")
        write_arrays(self._file(index), arrays, {"rows": [rows.start, rows.stop]})

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Chunk `index`; FileNotFoundError where it is not written yet, DamagedFileError where it is damaged."""
        arrays, header = read_arrays(self._file(index))
        self._check_place(index, arrays, header)
        return arrays

    def _check_place(self, index: int, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
        """Raises DamagedFileError where a file's content, intact as it is, is that of another chunk."""
        rows = self.rows(index)
        given = {field: (array.shape[1:], array.dtype) for field, array in arrays.items()}
        if given != self.fields or header != {"rows": [rows.start, rows.stop]}:
            raise DamagedFileError(f"{self._file(index)} holds {_show(given)} of {header}: not the chunk of its name")

    def clear(self) -> None:
        """Removes all chunks; StorageError where the disk refuses."""
        for index in range(self.num_chunks):
            with storage_errors(self._file(index), "delete"):
                self._file(index).unlink(missing_ok=True)

    def read_all(self) -> dict[str, np.ndarray]:
        """Every field as one (num_rows, *row shape) array.

        Raises StorageError where a chunk is absent or damaged.
        """
        result = {field: np.empty((self.num_rows, *shape), dtype) for field, (shape, dtype) in self.fields.items()}
        for index in range(self.num_chunks):
            try:
                chunk = self.read(index)
            except (FileNotFoundError, DamagedFileError) as error:
                raise StorageError(
                    f"chunk {index} of {self.num_chunks} in {self.path} is absent or damaged ({error}). Start the "
                    "command that makes this stage again: it computes what is missing."
                ) from error
            for field, array in chunk.items():
                result[field][self.rows(index)] = array
        return result

    def array(self, field: str, mapped_chunks: int = 128) -> JoinedArray:
        """One field of a complete store as an array on disk, of which `mapped_chunks` files are open at a time.

        Chunks are mapped, and checked, when they are first used. Raises StorageError then where one is damaged: it is
        deleted, so that the next run computes it again.
        """
        shape, dtype = self.fields[field]
        checked: set[int] = set()

        @functools.lru_cache(mapped_chunks)
        def part(index: int) -> np.ndarray:
            file = self._file(index)
            try:
                mapped, header = map_arrays(file, check=index not in checked)
                self._check_place(index, mapped, header)
            except DamagedFileError as error:
                with storage_errors(file, "delete the damaged"):
                    file.unlink(missing_ok=True)
                raise StorageError(
                    f"{error}. It was deleted: start the same command again to compute it anew."
                ) from error
            checked.add(index)
            return mapped[field]

        lengths = [self.rows(index).stop - self.rows(index).start for index in range(self.num_chunks)]
        return JoinedArray(lengths, part, shape, dtype)

    def _file(self, index: int) -> Path:
        return self.path / f"chunk-{index:06d}.safetensors"

    def _agree_on_layout(self, rows_per_chunk: int) -> int:
        """Writes the layout, or compares with the stored one; returns the rows per chunk to use."""
        expected = {"fields": _show(self.fields), "num_rows": self.num_rows}
        file = self.path / _LAYOUT
        if not file.exists():
            write_json(file, {**expected, "rows_per_chunk": rows_per_chunk})
            return rows_per_chunk
        with storage_errors(file, "read"):
            content = file.read_bytes()
        try:
            stored = json.loads(content)
            kept = int(stored["rows_per_chunk"])
            if kept < 1:
                raise ValueError(f"rows_per_chunk is {kept}")
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file} is damaged ({error!r}). Delete {self.path} to compute its chunks anew."
            ) from error
        for key, value in expected.items():
            if stored.get(key) != value:
                raise StorageError(
                    f"{self.path} was made with other rows: {key} found {stored.get(key)}, expected {value}. Give "
                    "another --workdir, or delete the folder."
                )
        if kept != rows_per_chunk:
            _log.info("%s keeps its %d rows a chunk", self.path, kept)
        return kept


def _show(fields: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{field} {tuple(shape)} {dtype}" for field, (shape, dtype) in sorted(fields.items()))
