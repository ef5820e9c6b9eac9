"""What the student sees of a query and of a training image: features of a tower's two halves, and pooled latents."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from attrib_jax.attribution.features import normalise_rows, pixel_features, text_features
from attrib_jax.convert.tower import Tower, load_tower, tower_fingerprint
from attrib_jax.core.settings import Settings, setting
from attrib_jax.jobs.context import Run, check_images, dataset_fingerprints
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods.tower_features import dataset_caption_features, dataset_image_features

KINDS = ("image", "text", "latents")
# Cells a side that latents are averaged to.
_POOLED = 4
_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentFeatureConfig(Settings):
    """The features that a student reads."""

    tower: str | None = setting(
        None,
        "Feature tower of the student: a folder of a CLIP with both halves in the transformers layout, or a Hugging "
        "Face id.",
        path=True,
        content=tower_fingerprint,
    )
    student_features: tuple[str, ...] = setting(
        ("image", "text"),
        "Features of the student, side by side: of the image, of its caption, and latents averaged to 4 x 4 cells.",
        choices=KINDS,
    )

    def __post_init__(self):
        super().__post_init__()
        names = self.student_features
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"student_features is {names}: expected one or more of {', '.join(KINDS)}, each once. Change "
                "student_features."
            )
        if self.tower is None:
            raise ValueError(
                "tower is None: a student expected a folder of a CLIP such as openai/clip-vit-base-patch32 or "
                "models/openmoji_tower. Give --tower."
            )


class Features:
    """Features of queries and of training images, each kind at unit length, side by side.

    Attributes:
      names: kinds of features, in order.
      tower: the tower.
      width: of all features together.
      fingerprint: sha256 of the tower's files.
    """

    def __init__(self, config: StudentFeatureConfig, latent_channels: int):
        """Loads the tower.

        Raises ValueError where the tower lacks a half that is needed; FileNotFoundError where there is no such folder.
        """
        self.names, self.path = config.student_features, str(config.tower)
        self.tower: Tower = load_tower(self.path)
        self.fingerprint = tower_fingerprint(self.path)
        for name, part in (("image", self.tower.processor), ("text", self.tower.tokenizer)):
            if name in self.names and part is None:
                half = {"image": "vision", "text": "text"}[name]
                raise ValueError(
                    f"tower is {self.path!r}, which lacks the {half} half that student_features={','.join(self.names)} "
                    "needs: expected a whole CLIP such as openai/clip-vit-base-patch32. Change tower or "
                    "student_features."
                )
        own = self.tower.module.feature_width()
        self.widths = tuple(_POOLED**2 * latent_channels if name == "latents" else own for name in self.names)
        self.width = sum(self.widths)

    def of_queries(self, queries: Sequence[PreparedQuery]) -> np.ndarray:
        """(Q, width) float32."""
        found = {}
        if "image" in self.names:
            found["image"] = pixel_features(self.tower, np.stack([query.image for query in queries]))
        if "text" in self.names:
            found["text"] = text_features(self.tower, [query.prompt for query in queries])
        if "latents" in self.names:
            found["latents"] = pool_latents(np.stack([query.latents for query in queries]))
        return self._join(found)

    def of_dataset(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Row ids (N,) of the images that could be read, and their features (N, width) float32.

        An image counts as it is, with its first caption. Each half of the tower is a stage, which the methods that
        compare features share.
        """
        check_images(run.dataset, "index")
        inputs = {**dataset_fingerprints(run), "tower": self.fingerprint}
        row_ids = np.asarray(run.data.row_ids)
        order = {int(row): place for place, row in enumerate(run.dataset.row_ids)}
        places = np.array([order[int(row)] for row in row_ids])
        found = {}
        with run.timed("features"):
            if "image" in self.names:
                name = f"features/images-{self.fingerprint[:12]}"
                images, kept = dataset_image_features(
                    run.root, name, inputs, run.dataset, self.tower, run.encode_config.workers
                )
                readable = np.isin(places, kept)
                row_ids, places = row_ids[readable], places[readable]
                found["image"] = np.asarray(images[places])[:, 0]
            if "text" in self.names:
                name = f"features/captions-{self.fingerprint[:12]}"
                captions = dataset_caption_features(run.root, name, inputs, run.dataset, self.tower)
                counts = [len(run.dataset.captions(place)) for place in range(len(run.dataset))]
                first = np.cumsum([0, *counts[:-1]])
                found["text"] = np.asarray(captions[first[places]])[:, 0]
            if "latents" in self.names:
                stored = np.searchsorted(run.data.row_ids, row_ids, sorter=np.argsort(run.data.row_ids))
                stored = np.argsort(run.data.row_ids)[stored]
                found["latents"] = np.concatenate(
                    [pool_latents(_latents(run, stored[i : i + _BLOCK])) for i in range(0, len(stored), _BLOCK)]
                )
        return row_ids, self._join(found)

    def _join(self, found: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([normalise_rows(found[name]) for name in self.names], axis=1).astype(np.float32)


def pool_latents(latents: np.ndarray) -> np.ndarray:
    """Latents (B, h, w, c) averaged over a grid of 4 x 4 cells -> (B, 16 c); a smaller one is repeated."""
    count, height, width, channels = latents.shape
    rows = np.clip(np.linspace(0, height, _POOLED + 1).astype(int), 0, height)
    columns = np.clip(np.linspace(0, width, _POOLED + 1).astype(int), 0, width)
    cells = [
        latents[:, min(top, height - 1) : max(bottom, top + 1), min(left, width - 1) : max(right, left + 1)].mean(
            (1, 2)
        )
        for top, bottom in zip(rows, rows[1:])
        for left, right in zip(columns, columns[1:])
    ]
    return np.stack(cells, axis=1).reshape(count, _POOLED**2 * channels)


def _latents(run: Run, rows: np.ndarray) -> np.ndarray:
    zeros = np.zeros(len(rows), np.int64)
    return np.asarray(run.data.inputs(rows, zeros, zeros)[0])


def feature_inputs(run: Run, features: Features) -> dict[str, Any]:
    """Fingerprints of all that decides the features of a data set."""
    return {**run.inputs, **dataset_fingerprints(run), "tower": features.fingerprint}
