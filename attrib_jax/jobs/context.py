"""The run: a model, its training set and a workdir, which every method works with."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_finite
from attrib_jax.core.fingerprint import digest, params_fingerprint
from attrib_jax.core.weights import Params, select_weights
from attrib_jax.data.concat import ConcatDataset
from attrib_jax.data.latents import LatentsDataset
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.encode import EncodeConfig, encode, stage_names
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.hosts import on_host_memory, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, mesh_platform, num_parts
from attrib_jax.storage.stage_root import StageRoot

# Of a device's memory, what weights, F and sums may fill; and how often the selected weights are held beside.
_WEIGHTS_SHARE = 0.5
_COPIES_OF_SELECTED = 4


class Run:
    """A model, its training set and a workdir, ready for queries; hold the lock of the workdir while using it.

    Attributes:
      pipeline: the model.
      dataset: its training images.
      root: where stages are kept.
      encode_config: how images and captions are encoded.
      predict: the model's predictor in float32.
      inputs: fingerprints of model and data set, and how the data set is encoded: the inputs of every stage.
      timings: stage -> (seconds, whether it was reused).

    Raises:
      ValueError: the model's weights are not finite.
      StageMismatchError: the workdir holds stages of another model or data set.
    """

    def __init__(
        self, pipeline: Pipeline, dataset: Dataset, root: StageRoot, encode_config: EncodeConfig = EncodeConfig()
    ):
        check_finite("model", pipeline.params)
        self.pipeline, self.dataset, self.root, self.encode_config = pipeline, dataset, root, encode_config
        self.predict = predictor(pipeline.unet)
        self.timings: dict[str, tuple[float, bool]] = {}
        self.inputs = {
            "model": model_fingerprint(pipeline),
            "dataset": dataset.fingerprint(),
            "encoding": encode_config.encoding(),
        }
        root.claim(self.inputs)
        self._data: EncodedDataset | None = None

    @property
    def data(self) -> EncodedDataset:
        """The encoded data set, encoded or read when it is first needed."""
        if self._data is None:
            reused = all(self.root.is_finished(name, {}, self.inputs) for name in stage_names(self.dataset))
            with self.timed("encode", reused):
                self._data = encode(self.root, self.pipeline, self.inputs, self.dataset, self.encode_config)
        return self._data

    def mesh(self, config: Any) -> Mesh:
        """The devices that work for a method of `config`, see `run_mesh`."""
        return run_mesh(self.pipeline, config)

    def select(self, weights: str) -> tuple[Params, Params]:
        """The denoiser's parameters as (those that move, the others), see `select_weights`."""
        return select_weights(self.pipeline.params["unet"], weights)

    @contextlib.contextmanager
    def timed(self, stage: str, reused: bool = False) -> Iterator[None]:
        """A context that adds its seconds to `timings`; `reused` where it only reads what was stored."""
        began = time.monotonic()
        yield
        before, was_reused = self.timings.get(stage, (0.0, True))
        self.timings[stage] = (round(before + time.monotonic() - began, 2), reused and was_reused)


def run_mesh(pipeline: Pipeline, config: Any) -> Mesh:
    """All devices of all hosts; with the axis `model` where `config.model_parallel` says or needs it.

    0 takes the fewest devices for a group on which weights, F and sums of gradients fill no more than half of a
    device's memory; the other half is for the activations. A config without that setting divides nothing.

    Raises ValueError where `model_parallel` does not divide the number of devices.
    """
    parts = getattr(config, "model_parallel", 1)
    if parts == 0:
        devices = jax.devices()
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        parts = 1
        # EKFAC cannot be divided.
        divisible = getattr(config, "curvature", None) != "ekfac" and devices[0].platform != "cpu"
        if limit and divisible and len(devices) > 1:
            # Host 0 decides, as devices of one kind may differ by what others left of them.
            held = _held_bytes(pipeline.params["unet"], getattr(config, "weights", None))
            parts = run_on_host0(lambda: fewest_parts(held, limit, len(devices)))
    return data_mesh(model_parallel=parts)


def load_divisible(load: Callable[[], Pipeline], config: Any) -> Pipeline:
    """`load()`, with the denoiser in this host's memory where `config` will divide its weights.

    So no device holds it whole, not even while it is read. Raises ValueError, before anything is read, where
    `config.model_parallel` does not divide the number of devices.
    """
    parts = getattr(config, "model_parallel", 1)
    if parts > 1:
        data_mesh(model_parallel=parts)
    if parts == 1 or mesh_platform(data_mesh()) == "cpu":
        return load()
    with on_host_memory():
        pipeline = load()
    divided = num_parts(run_mesh(pipeline, config)) > 1

    def to_device(tree):
        # As loading does, on no device in particular.
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), tree)

    params = {part: tree if divided and part == "unet" else to_device(tree) for part, tree in pipeline.params.items()}
    return dataclasses.replace(pipeline, params=params)


def fewest_parts(held: int, limit: int, devices: int) -> int:
    """The least divisor of the number of `devices` by which `held` bytes fit into half of `limit`; at most all."""
    sizes = (size for size in range(1, devices + 1) if devices % size == 0)
    return next((size for size in sizes if held / size <= _WEIGHTS_SHARE * limit), devices)


def _held_bytes(params: Params, weights: str | None) -> int:
    def count(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # The weights that move beside those that they were, F, and a gradient's sum as a pair.
    return count(params) + (0 if weights is None else _COPIES_OF_SELECTED * count(select_weights(params, weights)[0]))


def model_fingerprint(pipeline: Pipeline) -> str:
    """SHA-256 of all that decides what a model computes: weights, configs, schedule and tokenizer."""
    return digest([params_fingerprint(pipeline.params), json.dumps(pipeline.configs(), sort_keys=True)])


def check_images(dataset: Dataset, method: str) -> None:
    """Raises ValueError where a data set holds latents alone."""
    if isinstance(dataset, ConcatDataset):
        check_images(dataset.first, method)
        check_images(dataset.second, method)
    elif isinstance(dataset, LatentsDataset) and dataset.images is None:
        raise ValueError(
            f"method {method!r} compares images or captions, and {dataset.name!r} holds latents alone; give the data "
            "set that has them with --images"
        )


def dataset_fingerprints(run: Run) -> dict[str, str]:
    """Fingerprints of the data set, and of the images beside the latents, which those do not tell."""
    beside = shown_images_fingerprint(run.dataset)
    return {"dataset": run.inputs["dataset"]} | ({"images": beside} if beside else {})


def shown_images_fingerprint(dataset: Dataset) -> str:
    """Of the images that stand beside latents (`--images`); empty where the data set has none of these."""
    if isinstance(dataset, ConcatDataset):
        parts = [shown_images_fingerprint(part) for part in (dataset.first, dataset.second)]
        return "+".join(parts) if any(parts) else ""
    if isinstance(dataset, LatentsDataset) and dataset.images is not None:
        return dataset.images.fingerprint()
    return ""
