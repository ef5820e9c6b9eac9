"""The losses stage on a `latents:` data set, in a process of its own: what benchmarks/scaling.py measures."""

import ctypes
import functools
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from attrib_jax.attribution.scores import EXAMPLES_PER_TILE
from attrib_jax.convert.parts import abstract_unet_params
from attrib_jax.data.latents import open_latents
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import dataset_pass, loss_program
from attrib_jax.jobs.settings import LossSettings
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.parallel.compilation_cache import enable_compilation_cache
from attrib_jax.parallel.mesh import data_mesh, shard_batch
from benchmarks.sizes import Size


class LossesRun:
    """A model with random weights and a data set on disk, ready to compute losses: the program is compiled."""

    def __init__(self, size: Size, folder: str, devices: int):
        """Opens the data set in `folder`, on a CPU that is split into `devices`."""
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        enable_compilation_cache()
        unet, rng = UNet2DConditionModel(UNetConfig.from_dict(size.unet)), np.random.default_rng(size.seed)
        params = jax.tree.map(
            lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), abstract_unet_params(unet)
        )
        self.mesh = data_mesh()
        stored = open_latents(folder)
        self._data = EncodedDataset(stored.row_ids, stored.latents, stored.text, stored.first_caption, stored.positions)
        # What the losses need of a run: there are no encoders, and nothing to be claimed.
        model = SimpleNamespace(unet=unet, schedule=NoiseSchedule.from_config(size.scheduler))
        self._run = SimpleNamespace(pipeline=model, data=self._data)
        settings = LossSettings(loss_seed=size.seed, stride=size.stride, captions="first", flips="max")
        self._program = loss_program(self._run, settings)
        self._params = self._program.place(params)
        self._libc = ctypes.CDLL(None)
        self._tile = EXAMPLES_PER_TILE * self.mesh.size
        # Until it neither compiles nor fills caches.
        self._losses(self._data, np.arange(min(len(self._data), 4 * self._tile)))

    def stage(self) -> float:
        """Seconds that the stage takes for all images and their mirror images, its chunks written."""
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            dataset_pass(self._run, [Path(folder) / "base"], self._program, [self._params], "losses")
            return time.perf_counter() - began

    def trim(self) -> None:
        """Has glibc give back to the system what it keeps for reuse; nothing on systems without it."""
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)

    def input_share(self, tiles: int) -> tuple[float, float]:
        """The input pipeline's part of a step's time, in two ways.

        Returns:
          The time to read a tile's inputs and place them on the devices, over that of a step: what a device would wait
          if nothing overlapped. And by how much steps are shorter where the inputs are in memory already.
        """
        rows = np.arange(min(len(self._data), tiles * self._tile // 2))
        cached = _CachedDataset(
            self._data.row_ids, self._data.latents, self._data.text, self._data.first_caption, self._data.positions
        )
        self._losses(cached, rows)
        times = {"disk": [], "memory": [], "inputs": []}
        for _ in range(3):
            times["disk"].append(self._losses(self._data, rows))
            times["memory"].append(self._losses(cached, rows))
            times["inputs"].append(self._inputs(rows))
        seconds = {name: float(np.median(values)) for name, values in times.items()}
        return seconds["inputs"] / seconds["disk"], 1 - seconds["memory"] / seconds["disk"]

    def _losses(self, data: EncodedDataset, rows: np.ndarray) -> float:
        began = time.perf_counter()
        self._program(self._params, data, rows)
        return time.perf_counter() - began

    def _inputs(self, rows: np.ndarray) -> float:
        rows, flips = np.repeat(rows, 2), np.tile(np.arange(2), len(rows))
        began = time.perf_counter()
        for first in range(0, len(rows), self._tile):
            taken = np.minimum(np.arange(first, first + self._tile), len(rows) - 1)
            jax.block_until_ready(shard_batch(self.mesh, self._data.inputs(rows[taken], flips[taken], 0)))
        return time.perf_counter() - began


class _CachedDataset(EncodedDataset):
    """A data set that keeps every batch that it has read: reading it again costs nothing."""

    @functools.cached_property
    def _batches(self) -> dict[bytes, tuple[np.ndarray, np.ndarray]]:
        return {}

    def inputs(self, row, flip, caption):
        key = np.asarray(row).tobytes() + np.asarray(flip).tobytes()
        if key not in self._batches:
            self._batches[key] = super().inputs(row, flip, caption)
        return self._batches[key]
