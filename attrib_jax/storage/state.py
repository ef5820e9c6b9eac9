"""The running state of a long sum, checkpointed so that a killed run resumes to the same bits.

Kept by hand: orbax writes a folder of many files for each state and does not notice a flipped bit; this is one file.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.storage.files import DamagedFileError, StorageError, make_folder, read_arrays, write_arrays

_log = logging.getLogger(__name__)


class _Stored(NamedTuple):
    sequence: int
    file: Path
    arrays: dict[str, np.ndarray]
    progress: Any


class StateStore:
    """A pytree of arrays and the progress that it stands for, replaced as a whole, in `<stage_path>/<name>/`.

    Two files alternate, so that a sum whose newer file is damaged continues from the one before it and not from zero.
    A sum that adds the same batches in the same order gives the same bits from either.
    """

    def __init__(self, stage_path: str | os.PathLike, name: str = "state"):
        """Creates no folder until the first state is written."""
        self.path = Path(stage_path) / name
        self._sequence: int | None = None

    def write(self, tree: Any, progress: Any) -> None:
        """Stores `tree` (arrays of any dtype that numpy knows by itself) and `progress` (a JSON value).

        Raises StorageError where the disk refuses; the state stored before is then unchanged.
        """
        if self._sequence is None:
            self._newest()
        sequence = (self._sequence or 0) + 1
        arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(tree).items()}
        make_folder(self.path)
        write_arrays(self._file(sequence), arrays, {"sequence": sequence, "progress": progress})
        self._sequence = sequence

    def read(self, like: Any) -> tuple[Any, Any] | None:
        """The newest undamaged `(tree, progress)`, numpy leaves in the structure of `like`; None if there is none.

        Raises StorageError naming both sides where leaves, shapes or dtypes differ from those of `like`.
        """
        newest = self._newest()
        if newest is None:
            return None
        leaves = _named_leaves(like)
        expected = {name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves.items()}
        stored = {name: f"{array.shape} {array.dtype}" for name, array in newest.arrays.items()}
        differences = [
            f"  {name}: found {stored.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
            for name in sorted(stored.keys() | expected.keys())
            if stored.get(name) != expected.get(name)
        ]
        if differences:
            raise StorageError(
                f"{newest.file} is the state of another sum:\n" + "\n".join(differences) + "\n"
                f"Give another --workdir, or delete {self.path} to sum anew."
            )
        return jax.tree.unflatten(jax.tree.structure(like), [newest.arrays[name] for name in leaves]), newest.progress

    def remove(self) -> None:
        """Deletes the folder, when the sum that it led to is stored elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._sequence = None

    def _file(self, sequence: int) -> Path:
        # By parity, the write after a damaged newest state replaces the damaged file and not the good one.
        return self.path / f"state-{sequence % 2}.safetensors"

    def _newest(self) -> _Stored | None:
        newest = None
        for parity in (0, 1):
            file = self._file(parity)
            try:
                arrays, header = read_arrays(file)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                _log.warning("%s: going on from the state before it, if there is one", error)
                continue
            if newest is None or header["sequence"] > newest.sequence:
                newest = _Stored(header["sequence"], file, arrays, header["progress"])
        self._sequence = -1 if newest is None else newest.sequence
        return newest


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for path, leaf in leaves
    }
