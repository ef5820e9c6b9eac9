"""Settings of the methods that compare projected per-example gradients: TRAK, Journey-TRAK, D-TRAK and DAS."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from attrib_jax.attribution.projection import check_projection
from attrib_jax.core.checks import check_positive, check_range

_OUTPUTS = {"trak": "loss", "journey-trak": "loss", "d-trak": "square", "das": "mean"}
PROJECTED_METHODS = tuple(_OUTPUTS)


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """How gradients are projected and compared; METHOD.md sections 7 and 10.

    Attributes:
      projection: `sparse` or `rademacher`, see `attrib_jax.attribution.projection`.
      projection_dim: k, numbers kept of each gradient.
      projection_seed: of the projection; every model of an ensemble has one of its own made from it.
      regularisation: lambda in units of the mean eigenvalue of Phi^T Phi, see `kernel_scores`.
      journey_timestep: the timestep of the query's loss in `journey-trak`.
      das_leverage: `das` divides by 1 - h_i, the leverage of each training example.
      ensemble: folders of further models trained on the same data set, whose scores are averaged with the model's: UNet
        folders, or pipeline folders with the same autoencoder and text encoder.
    """

    projection: str = "sparse"
    projection_dim: int = 2048
    projection_seed: int = 0
    regularisation: float = 0.1
    journey_timestep: int = 400
    das_leverage: bool = False
    ensemble: tuple[str, ...] = ()

    def __post_init__(self):
        check_projection(self.projection, self.projection_dim)
        check_range("projection_seed", self.projection_seed, 0, 2**32 - 1, integer=True)
        check_positive("regularisation", self.regularisation)
        check_range("journey_timestep", self.journey_timestep, 0, integer=True)
        if isinstance(self.ensemble, str):
            raise ValueError(f"ensemble is {self.ensemble!r}: expected a tuple of folders. Change ensemble.")
        object.__setattr__(self, "ensemble", tuple(os.fspath(path) for path in self.ensemble))
        repeated = sorted({path for path in self.ensemble if self.ensemble.count(path) > 1})
        if repeated:
            raise ValueError(f"ensemble holds {repeated[0]!r} more than once: expected each model once.")

    def output(self, method: str) -> str:
        """The model output whose gradients `method` compares, see `attrib_jax.attribution.outputs`."""
        return _OUTPUTS[method]

    def settings(self, method: str) -> dict[str, Any]:
        """What decides the scores of `method`; of an ensemble's models the content of their files.

        Raises FileNotFoundError where a model of the ensemble does not exist.
        """
        names = ["projection", "projection_dim", "projection_seed", "regularisation"]
        names += {"journey-trak": ["journey_timestep"], "das": ["das_leverage"]}.get(method, [])
        settings = {name: getattr(self, name) for name in names}
        if self.ensemble:
            settings["ensemble"] = sorted(_content(unet_folder(path)) for path in self.ensemble)
        return settings


def unet_folder(path: str) -> Path:
    """The folder with the UNet of a model of an ensemble; FileNotFoundError where there is none."""
    folder = Path(path) / "unet" if (Path(path) / "model_index.json").is_file() else Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"ensemble holds {path!r}: expected a pipeline folder, or a UNet folder with config.json and weights"
        )
    return folder


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(file, "rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
