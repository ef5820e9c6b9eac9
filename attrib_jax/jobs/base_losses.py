"""The losses of the training pictures under the model's own weights, which all queries share."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import dataset_values
from attrib_jax.jobs.programs import ScorePrograms
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.storage.stage_root import StageRoot


class BaseLosses:
    """Base losses by settings, each a stage that is computed once."""

    def __init__(
        self,
        root: StageRoot,
        inputs: Mapping[str, str],
        programs: ScorePrograms,
        data: Callable[[], EncodedDataset],
        timed: Callable[[str, bool], contextlib.AbstractContextManager],
    ):
        """`data` gives the encoded data set when it is needed; `timed(stage, reused)` is a context that measures."""
        self._root, self._inputs, self._programs, self._data, self._timed = root, inputs, programs, data, timed

    def losses(self, config: AttributeConfig) -> np.ndarray:
        """Losses of all pictures (N, flips), computed or reused."""
        stage = self._stage(config)
        if config.flips == "none":
            both = dataclasses.replace(config, flips="max")
            if self._root.is_finished(*self._stage(both)):
                # The losses of the pictures as they are, to the bit.
                return self.losses(both)[:, :1]
        with self._timed("base losses", self._root.is_finished(*stage)), self._root.stage(*stage) as opened:
            return self._dataset_values(opened.path, config)

    def of_rows(self, config: AttributeConfig, rows: np.ndarray, path: Path, runs: int = 1) -> np.ndarray:
        """Losses of the pictures at the positions `rows` (len(rows), flips).

        From the stage of all pictures where it is finished, or where `runs` calls such as this would cost as much as
        making it; else computed for these alone, and kept in `path`.
        """
        if runs * len(rows) >= len(self._data()) or self.is_finished(config):
            return self.losses(config)[rows]
        with self._timed("base losses", False):
            return self._dataset_values(path, config, rows)

    def is_finished(self, config: AttributeConfig) -> bool:
        """Whether the losses of all pictures are there."""
        both = dataclasses.replace(config, flips="max")
        return any(self._root.is_finished(*self._stage(stored)) for stored in (config, both))

    def _dataset_values(self, path: Path, config: AttributeConfig, rows: np.ndarray | None = None) -> np.ndarray:
        program, params = self._programs.losses(config), self._params(config)
        flips, captions = config.num_flips, config.captions
        return dataset_values(path, program, params, self._data(), flips, captions, "losses before", rows)

    def _params(self, config: AttributeConfig) -> Any:
        return self._programs.params(config, self._programs.selected(config))

    def _stage(self, config: AttributeConfig) -> tuple[str, dict[str, Any], Mapping[str, str]]:
        settings = {name: getattr(config, name) for name in ("loss_seed", "stride", "captions", "num_flips")}
        name = f"losses/stride{config.stride}-{config.captions}-flips{config.num_flips}-seed{config.loss_seed}"
        # Losses in float32 keep the name and the settings from before there were others.
        if config.precision != "float32":
            name, settings = f"{name}-{config.precision}", {**settings, "precision": config.precision}
        return name, settings, self._inputs
