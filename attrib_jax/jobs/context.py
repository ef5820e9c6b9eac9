"""The run: a model, its training set and a workdir, which every method works with."""

import contextlib
import json
import time
from collections.abc import Iterator

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
from attrib_jax.storage.stage_root import StageRoot


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
