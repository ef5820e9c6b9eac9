"""Where the stages of a run lie: its workdir, and stages that came finished with the model."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrib_jax.runtime.files import StorageError
from attrib_jax.runtime.stages import Stage, load_stage, open_stage

_log = logging.getLogger(__name__)


class StageRoot:
    """Opens stages by name in a workdir, or reuses those of `shipped`, which is only read.

    A shipped stage is used if it is finished and was made with the settings and inputs that are asked for, and the
    workdir has none of that name. Otherwise the stage is computed in the workdir.
    """

    def __init__(self, workdir: str | os.PathLike, shipped: str | os.PathLike | None = None):
        self.workdir = Path(workdir)
        self.shipped = Path(shipped) if shipped is not None and Path(shipped).is_dir() else None

    @contextlib.contextmanager
    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[Stage]:
        """Opens a stage to be filled or read, and marks it finished when the block ends without an error.

        Raises StageMismatchError where the workdir's stage of that name has other settings or inputs.
        """
        stage = self._shipped(name, settings, inputs)
        if stage is not None:
            yield stage
            return
        stage = open_stage(self.workdir, name, settings, inputs)
        yield stage
        if not stage.finished:
            stage.finish()

    def is_finished(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether `stage` with the same arguments would find everything done."""
        if self._shipped(name, settings, inputs) is not None:
            return True
        return (self.workdir / name / "stage.json").exists() and load_stage(self.workdir, name).finished

    def _shipped(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage | None:
        if self.shipped is None or (self.workdir / name).exists():
            return None
        try:
            stage = load_stage(self.shipped, name)
        except StorageError:
            return None
        if stage.finished and stage.settings == dict(settings) and stage.inputs == dict(inputs):
            return stage
        _log.warning("the %s that came with the model was made from another model or data set: computing it anew", name)
        return None
