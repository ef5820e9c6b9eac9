"""Stage folders: what made the data is written beside it, and checked before anything is reused.

A stage is a folder `<workdir>/<name>/` with its data and a `stage.json`: the settings that decide the result (not those
that only change speed), the fingerprints of its inputs, library versions, and whether it is finished.

The lock is kept by hand: filelock does not say who holds a lock, and where a file system has none it leaves a marker
behind when its process is killed.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from attrib_jax.core.checks import expand_path
from attrib_jax.parallel.hosts import host0_first, is_host0, run_on_host0
from attrib_jax.storage.files import StorageError, make_folder, remove_partial_files, storage_errors, write_json

_log = logging.getLogger(__name__)

FORMAT = 1
_RECORD = "stage.json"
_LOCK = ".lock"
_VERSIONED = ("attrib_jax", "jax", "jaxlib", "flax", "numpy")
_KEYS = {
    "format": int,
    "stage": str,
    "settings": dict,
    "inputs": dict,
    "versions": dict,
    "created": str,
    "finished": bool,
}


class StageMismatchError(StorageError):
    """A stored stage was made with other settings or inputs than this run's; the message names both sides."""


class LockedError(StorageError):
    """Another run holds the lock of a workdir."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage folder that was opened by `open_stage` or `load_stage`.

    Attributes:
      path: folder of the stage.
      name: name that was given to `open_stage`.
      settings: JSON values that decide the result.
      inputs: name -> fingerprint of what the stage reads.
      versions: package -> version that created the stage.
      created: ISO 8601 time in UTC.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    created: str

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, by this run or an earlier one: read from disk, by host 0 for all."""
        return run_on_host0(lambda: _read_record(self.path)["finished"])

    def finish(self) -> None:
        """Marks the stage as complete, on disk; call it (on every host) when all of its data is written."""
        run_on_host0(lambda: write_json(self.path / _RECORD, {**_read_record(self.path), "finished": True}))


def open_stage(
    workdir: str | os.PathLike,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    remedy: str | None = None,
) -> Stage:
    """Creates the stage `<workdir>/<name>/`, or opens it to be resumed or reused if it was made in the same way.

    Hold `lock(workdir)` from before this call until the stage is written: it clears what a killed run left. With
    several hosts every host calls it: host 0 creates or checks the stage, and the others then read its record.

    Args:
      workdir: folder of the run.
      name: name of the stage, which may be nested, as in `attribution/cat`.
      settings: JSON values (None, bool, numbers, str, lists, dicts with str keys) that decide the result.
      inputs: name -> fingerprint of what the stage reads.
      remedy: last sentence of the error for a stage that was made differently; by default, to give another workdir or
        delete the stage.

    Raises:
      StageMismatchError: the stored stage has other settings or inputs.
      StorageError: the stage cannot be read or written, or the folder holds files of unknown origin.
      ValueError: settings are not JSON values.
    """
    # Only host 0 clears what a killed run left: it may be writing by the time that the others come here.
    return host0_first(
        lambda: _open(workdir, name, settings, inputs, remedy) if is_host0() else load_stage(workdir, name)
    )


def _open(workdir, name, settings, inputs, remedy) -> Stage:
    path = _stage_path(workdir, name)
    expected = {"settings": _as_json("settings", settings), "inputs": _as_json("inputs", inputs)}
    exists = (path / _RECORD).exists()
    if exists:
        stage = load_stage(workdir, name)
        differences = [
            *_differences(stage.settings, expected["settings"], "settings"),
            *_differences(stage.inputs, expected["inputs"], "inputs"),
        ]
        if differences:
            heading = f"stage {name!r} in {path} was made with other settings or inputs:"
            last = remedy or f"Give another --workdir, or delete {path} to compute it anew."
            raise StageMismatchError("\n".join([heading, *differences, last]))
    remove_partial_files(make_folder(path))
    if exists:
        return stage
    if any(path.iterdir()):
        raise StorageError(
            f"{path} holds files but no {_RECORD}, so what made them is unknown. Give another --workdir, or move the "
            "folder away."
        )
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record = {"format": FORMAT, "stage": name, **expected, "versions": versions, "created": _now(), "finished": False}
    write_json(path / _RECORD, record)
    return load_stage(workdir, name)


def load_stage(workdir: str | os.PathLike, name: str) -> Stage:
    """Opens a stored stage to read from it; `workdir` may be read-only.

    Raises StorageError where there is no such stage, or its record is damaged or of a newer format.
    """
    path = _stage_path(workdir, name)
    record = _read_record(path)
    if record["stage"] != name:
        raise StorageError(
            f"{path} belongs to stage {record['stage']!r}, not {name!r}: the folder was renamed. Name it as it was."
        )
    return Stage(path, name, record["settings"], record["inputs"], record["versions"], record["created"])


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds the exclusive lock of a workdir, so that two runs never write into the same stages.

    Raises LockedError at once if another process (or another `lock` in this one) holds it, naming the holder. The
    kernel releases the lock however the holder ends, so nothing needs clearing after a kill. With several hosts on one
    shared folder every host calls it: host 0 holds the lock for all.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(_hold(workdir))

        run_on_host0(hold)
        yield


@contextlib.contextmanager
def _hold(workdir: str | os.PathLike) -> Iterator[None]:
    workdir = make_folder(expand_path(workdir))
    file = workdir / _LOCK
    with storage_errors(file, "lock"):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{workdir} is in use by {_holder(descriptor)}. Wait until it ends, or give another --workdir."
            ) from error
        except OSError as error:
            # Some network file systems have no locks: refusing to work there would help nobody.
            _log.warning("cannot lock %s (%s): make sure that no other run uses this folder", workdir, error.strerror)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        with storage_errors(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        # The file stays: unlinking it would let two later runs lock two different files of the same name.
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f"another run (pid {record['pid']} on {record['host']}, started {record['started']})"
    except (ValueError, KeyError, TypeError):
        return "another run that has just started"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_record(path: Path) -> dict[str, Any]:
    file = path / _RECORD
    with storage_errors(file, "read"):
        content = file.read_bytes()
    try:
        record = json.loads(content)
        # A newer format may have other keys, so it is told apart before they are checked.
        if record["format"] > FORMAT:
            raise StorageError(
                f"{file} has format {record['format']}, this version reads up to {FORMAT}: use the version that wrote "
                "it or a newer one, or give another --workdir."
            )
        wrong = [key for key, kind in _KEYS.items() if not isinstance(record[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        wrong = [repr(error)]
    if wrong:
        raise StorageError(
            f"{file} is damaged or half-written ({', '.join(wrong)}). Delete {path} to compute the stage anew, or "
            f"restore {_RECORD} from a copy."
        )
    return record


def _stage_path(workdir: str | os.PathLike, name: str) -> Path:
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or str(relative) != name:
        raise ValueError(f"stage name is {name!r}: expected a plain name such as 'fisher' or 'attribution/cat'")
    return Path(workdir) / relative


def _as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it reads back from JSON, so that a tuple equals the list that it is stored as."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be stored as JSON ({error}): expected plain values, got {value!r}") from error


def _differences(found: Any, expected: Any, name: str) -> list[str]:
    """A line for each entry, however deep, in which two JSON values differ; `...` stands for an absent one."""
    if found == expected:
        return []
    if isinstance(found, dict) and isinstance(expected, dict) and found and expected:
        keys = sorted(found.keys() | expected.keys())
        return [
            line for key in keys for line in _differences(found.get(key, ...), expected.get(key, ...), f"{name}.{key}")
        ]
    found, expected = ("absent" if value is ... else json.dumps(value) for value in (found, expected))
    return [f"  {name}: found {found}, expected {expected}"]
