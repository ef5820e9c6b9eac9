"""Where the stages of a run are: its workdir, and stages that came finished with the model."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrib_jax.core.checks import expand_path
from attrib_jax.core.durable import new_folder, remove_leftovers
from attrib_jax.parallel.hosts import independent_hosts, is_host0, run_on_host0
from attrib_jax.storage.files import StorageError, make_folder, storage_errors
from attrib_jax.storage.stages import Stage, StageMismatchError, load_stage, open_stage

_log = logging.getLogger(__name__)


class StageRoot:
    """Opens stages by name in a workdir; finished ones in `shipped` are copied there when they fit.

    A shipped stage fits if it is finished and was made with the same settings and inputs. `shipped` is only read. With
    several hosts all make the same calls, and host 0 alone looks and copies.
    """

    def __init__(self, workdir: str | os.PathLike, shipped: str | os.PathLike | None = None):
        """`workdir` is the folder of the run, `shipped` one of finished stages or None."""
        self.workdir = Path(expand_path(workdir))
        self._shipped = Path(expand_path(shipped)) if shipped is not None else None

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Ties the workdir to these inputs, name -> fingerprint.

        Raises StageMismatchError if it is tied to others, or if another host has other inputs.
        """
        first = run_on_host0(lambda: dict(inputs))
        with independent_hosts():
            others = [name for name, value in inputs.items() if first[name] != value]
            if others:
                raise StageMismatchError(
                    f"the {' and '.join(others)} of this host and of host 0 differ: expected the same files and "
                    "settings on every host"
                )
        remedy = "Give another --workdir: this one holds the results of that model and data set."
        stage = open_stage(self.workdir, "inputs", {}, inputs, remedy)
        if not stage.finished:
            stage.finish()

    @contextlib.contextmanager
    def stage(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], remedy: str | None = None
    ) -> Iterator[Stage]:
        """A context: opens a stage to be filled or read, and marks it finished when the block ends without an error.

        A stage in which an error left nothing stored is removed, so that other settings can take its name. Arguments
        and errors are those of `open_stage`.
        """

        def copy() -> None:
            if self._fits(name, settings, inputs):
                target = self.workdir / name
                make_folder(target.parent)
                remove_leftovers(target)
                with storage_errors(target), new_folder(target) as fresh:
                    _copy_content(self._shipped / name, fresh)

        run_on_host0(copy)
        stage = open_stage(self.workdir, name, settings, inputs, remedy)
        try:
            yield stage
        except Exception:
            # With no call to the other hosts: they may not have failed.
            if is_host0() and [path.name for path in stage.path.iterdir()] == ["stage.json"]:
                shutil.rmtree(stage.path)
            raise
        if not stage.finished:
            stage.finish()

    def is_finished(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether `stage` with the same arguments would find everything done."""

        def look() -> bool:
            if (self.workdir / name / "stage.json").exists():
                return load_stage(self.workdir, name).finished
            return self._fits(name, settings, inputs)

        return run_on_host0(look)

    def holds(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether `stage` with the same arguments would find anything, begun in the workdir or come with the model."""
        return run_on_host0(lambda: (self.workdir / name / "stage.json").exists() or self._fits(name, settings, inputs))

    def _fits(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        if self._shipped is None:
            return False
        if (self.workdir / name).exists() or not (self._shipped / name).exists():
            return False
        try:
            stage = load_stage(self._shipped, name)
        except StorageError as error:
            _log.info("not using the %s that came with the model: %s", name, error)
            return False
        # As JSON has them, to which a tuple is a list.
        expected = json.loads(json.dumps([dict(settings), dict(inputs)]))
        fits = stage.finished and [stage.settings, stage.inputs] == expected
        if not fits:
            _log.info("the %s that came with the model is of another model or data set", name)
        return fits


def _copy_content(source: Path, target: Path) -> None:
    """Copies a folder's files without their modes: what comes with a model may be read-only."""
    target.mkdir()
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _copy_content(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)
