"""What `launch.verify` trains again: a LoRA, a Custom Diffusion fine-tune, or the UNet of a small model.

Each is trained by the code of `launch.train`, with the images that a training goes without left out of its batches.
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion, save_custom_diffusion
from attrib_jax.convert.adapters.lora import LORA_FILE, read_factors, save_lora
from attrib_jax.convert.adapters.lora_files import denoiser_part
from attrib_jax.convert.parts import load_part
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.files import write_weights
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.evaluation.retrain import Recipe, Retrainer
from attrib_jax.jobs.context import Run
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.files import make_folder
from attrib_jax.storage.state import StateStore
from attrib_jax.training.customize import Customization
from attrib_jax.training.draws import Training
from attrib_jax.training.lora import LoraConfig, seconds_per_step, train_factors, with_factors


class Trainer(Protocol):
    """A kind of training that may go without some of its images.

    Attributes:
      pipeline: the model that it starts from, or whose architecture and encoders it takes.
      row_ids: (N,) of the images that it trains on and may go without.
      noun: what it makes, as messages have it.
      steps: optimiser steps of a training.
      seed: the first training seed.
      settings: all that decides a training but for its seed and data, as JSON values.
      inputs: fingerprints of what it reads.
    """

    pipeline: Pipeline
    row_ids: np.ndarray
    noun: str
    steps: int
    seed: int
    settings: dict[str, Any]
    inputs: dict[str, Any]

    def seconds_per_step(self) -> float:
        """Measured seconds of an optimiser step, without compiling."""
        ...

    def is_trained(self, folder: Path) -> bool:
        """Whether a folder holds a finished training."""
        ...

    def model(self, folder: Path, training: Training, description: str) -> Pipeline:
        """The trained model, trained in `folder` where it is not stored there; resumes to the bit."""
        ...


class LoraTrainer:
    """Trains a LoRA, see `training.lora`."""

    noun = "adapters"

    def __init__(self, run: Run, config: LoraConfig):
        self.run, self.config = run, config
        self.pipeline, self.row_ids, self.inputs = run.pipeline, run.data.row_ids, run.inputs
        self.steps, self.seed = config.steps, config.seed
        self.settings = _without_seed(config.describe())

    def seconds_per_step(self) -> float:
        """See `Trainer`."""
        return seconds_per_step(self.run, self.config)

    def is_trained(self, folder: Path) -> bool:
        """See `Trainer`."""
        return (folder / LORA_FILE).exists()

    def model(self, folder: Path, training: Training, description: str) -> Pipeline:
        """See `Trainer`."""
        if not self.is_trained(folder):
            factors = train_factors(folder, self.run, self.config, training, description)
            save_lora(factors, folder, denoiser_part(self.pipeline))
        return with_factors(self.pipeline, read_factors(str(folder / LORA_FILE), self.pipeline))


class CustomizeTrainer:
    """Trains keys, values and a token on exemplars, see `training.customize`; prior images stay in every training."""

    noun = "fine-tunes"
    _FOLDER = "custom"

    def __init__(self, customization: Customization):
        self.customization, config = customization, customization.config
        self.pipeline, self.row_ids = customization.base, customization.exemplars.row_ids
        self.steps, self.seed = config.steps, config.seed
        self.settings, self.inputs = _without_seed(config.describe()), customization.inputs

    def seconds_per_step(self) -> float:
        """See `Trainer`."""
        return self.customization.seconds_per_step()

    def is_trained(self, folder: Path) -> bool:
        """See `Trainer`."""
        # The token's file is the last that is written.
        return any((folder / self._FOLDER).glob(f"{self.customization.config.token}.*"))

    def model(self, folder: Path, training: Training, description: str) -> Pipeline:
        """See `Trainer`."""
        path, config = str(folder / self._FOLDER), self.customization.config
        if not self.is_trained(folder):
            tuned = self.customization.train(folder, training, description)
            save_custom_diffusion(tuned, self.pipeline, path, [config.token], ".safetensors", overwrite=True)
        return apply_custom_diffusion(self.pipeline, path)


class UNetTrainer:
    """Trains a UNet from scratch on the fixed encoders of a small model, see `evaluation.retrain`, on one device."""

    noun = "models"
    _FILE = "unet.safetensors"

    def __init__(self, run: Run, recipe: Recipe, seed: int):
        self.pipeline, self.row_ids, self.inputs = run.pipeline, run.data.row_ids, run.inputs
        self.steps, self.seed, self.settings = recipe.steps, seed, recipe.settings()
        self._retrainer = Retrainer(run.pipeline, run.data, recipe, mesh=data_mesh(jax.local_devices()[:1]))

    def seconds_per_step(self) -> float:
        """See `Trainer`."""
        return self._retrainer.seconds_per_step()

    def is_trained(self, folder: Path) -> bool:
        """See `Trainer`."""
        return (folder / self._FILE).exists()

    def model(self, folder: Path, training: Training, description: str) -> Pipeline:
        """See `Trainer`."""
        file = str(folder / self._FILE)
        if not self.is_trained(folder):
            states = StateStore(folder, "training")
            trained = self._retrainer.train([training], states, description=description)
            make_folder(folder)
            write_weights(state_dict_of(jax.tree.map(lambda leaf: np.asarray(leaf[0]), trained)), file)
            states.remove()
        unet = load_part("unet", self.pipeline.unet, file, jnp.float32)
        return dataclasses.replace(self.pipeline, params=self.pipeline.params | {"unet": unet})


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seed"}
