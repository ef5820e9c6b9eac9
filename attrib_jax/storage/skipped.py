"""The list of images that an encoding had to leave out, written by several hosts that share only the folder.

A single host keeps it in `skipped.json`. Of several, each notes its own chunks in `skipped-<host>.json`; host 0 joins
these into the list when all have finished, or when the next run begins.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from attrib_jax.parallel.hosts import host_index, num_hosts, run_on_host0
from attrib_jax.storage.files import DamagedFileError, write_json

SKIPPED = "skipped.json"
_PARTS = "skipped-*.json"
_CHECKSUM = "crc32"

# First row, end, and the (row, reason) of those in between that are left out: all that is known of these rows.
_Note = tuple[int, int, list[tuple[int, str]]]


def read_skipped(path: str | os.PathLike) -> dict[int, str]:
    """Position -> reason, for the rows that an encoding in the folder `path` had to leave out.

    Raises DamagedFileError where the list is not what was written: which rows are in use depends on it.
    """
    file = Path(path) / SKIPPED
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        checksum = stored.pop(_CHECKSUM, None)
        if checksum is not None and checksum != _checksum(stored):
            raise ValueError("its content does not match its checksum")
        return {int(row): str(why) for row, why in stored.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise DamagedFileError(
            f"{file} is damaged ({error}), and which rows could be read depends on it. Delete the folder {file.parent} "
            "and start the same command again to compute it anew."
        ) from error


class SkippedRows:
    """The rows left out of the encoding in `path`; with several hosts, all make and `join` it together."""

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self.join()
        self._known = dict(run_on_host0(lambda: list(read_skipped(path).items())))
        self._notes: list[_Note] = []

    def store(self, rows: slice, reasons: dict[int, str]) -> None:
        """Notes which of the rows are left out, in place of what was known of them; each host for its own rows."""
        if not reasons and not any(rows.start <= row < rows.stop for row in self._known):
            return
        self._notes.append((rows.start, rows.stop, sorted(reasons.items())))
        if num_hosts() == 1:
            self._known = _replaced(self._known, self._notes[-1:])
            _write(self._path, self._known)
        else:
            write_json(self._path / f"skipped-{host_index()}.json", self._notes)

    def join(self) -> dict[int, str]:
        """Joins the notes of all hosts, those of a killed run too -> position -> reason, on every host."""

        def join_notes() -> list[tuple[int, str]]:
            listed = read_skipped(self._path)
            parts = sorted(self._path.glob(_PARTS))
            if parts:
                for part in parts:
                    listed = _replaced(listed, json.loads(part.read_text()))
                _write(self._path, listed)
            # Joining them again after a kill here would change nothing.
            for part in parts:
                part.unlink()
            return sorted(listed.items())

        return dict(run_on_host0(join_notes))


def _replaced(listed: dict[int, str], notes: Iterable[_Note]) -> dict[int, str]:
    for start, stop, reasons in notes:
        listed = {row: why for row, why in listed.items() if not start <= row < stop} | dict(reasons)
    return listed


def _write(path: Path, listed: dict[int, str]) -> None:
    rows = {str(row): why for row, why in sorted(listed.items())}
    write_json(path / SKIPPED, {**rows, _CHECKSUM: _checksum(rows)})


def _checksum(rows: dict[str, str]) -> int:
    return zlib.crc32(json.dumps(rows).encode())
