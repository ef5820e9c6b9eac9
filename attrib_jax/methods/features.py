"""Methods `clip`, `clip-text`, `dino`, `dinov2`, `clip-abc`, `dino-abc`: similarity of a tower's features.

docs/METHOD.md section 7. The features of a data set are a stage that all queries share.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.feature_head import FeatureHead, load_head
from attrib_jax.attribution.features import (
    IMAGE_TILE,
    TEXT_TILE,
    cosine_similarities,
    encode_images,
    encode_texts,
    pixel_features,
    text_features,
)
from attrib_jax.attribution.scores import make_scores
from attrib_jax.convert.tokenizer import tokenize_prompts
from attrib_jax.convert.tower import Tower, load_tower, tower_fingerprint
from attrib_jax.core.fingerprint import file_digest
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Scores
from attrib_jax.data.concat import ConcatDataset
from attrib_jax.data.latents import LatentsDataset
from attrib_jax.data.readers import ImageReader
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode_to_store import encode_to_store, make_store
from attrib_jax.jobs.settings import CaptionSettings, FlipSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.joined import JoinedArray
from attrib_jax.storage.skipped import SkippedRows, read_skipped
from attrib_jax.storage.stage_root import StageRoot

# The small CLIP that comes with the repository, trained on OpenMoji.
_SHIPPED = Path(__file__).parents[2] / "models" / "openmoji_tower"


class TowerMethod(NamedTuple):
    """One baseline: the family of its tower, the published one, and whether it compares texts or mapped features."""

    family: str
    example: str
    text: bool = False
    mapped: bool = False


_CLIP, _DINO = ("clip", "openai/clip-vit-base-patch32"), ("dino", "facebook/dino-vitb16")
TOWER_METHODS = {
    "clip": TowerMethod(*_CLIP),
    "clip-text": TowerMethod(*_CLIP, text=True),
    "dino": TowerMethod(*_DINO),
    "dinov2": TowerMethod("dinov2", "facebook/dinov2-with-registers-large"),
    "clip-abc": TowerMethod(*_CLIP, mapped=True),
    "dino-abc": TowerMethod(*_DINO, mapped=True),
}


def _names(text: bool = False, mapped: bool = False) -> tuple[str, ...]:
    return tuple(name for name, method in TOWER_METHODS.items() if (method.text, method.mapped) == (text, mapped))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig(MethodConfig):
    """The feature tower, which all of these methods read."""

    tower: str | None = setting(
        None,
        "Feature tower: a folder in the transformers layout or a Hugging Face id; for clip and clip-text on OpenMoji "
        "the one that comes with the repository.",
        path=True,
        content=tower_fingerprint,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.tower is None:
            raise ValueError(
                f"tower is None: method {self.method!r} expected a transformers folder or Hugging Face id such as "
                f"{TOWER_METHODS[self.method].example}. Give --tower."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig(TowerConfig, FlipSettings):
    """Settings of the similarity of image features."""

    method: str = setting("clip", "Attribution method.", choices=_names())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeatureConfig(TowerConfig, CaptionSettings):
    """Settings of the similarity of text features."""

    method: str = setting("clip-text", "Attribution method.", choices=_names(text=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedFeatureConfig(FeatureConfig):
    """Settings of the similarity of image features under a linear mapping (AbC)."""

    method: str = setting("clip-abc", "Attribution method.", choices=_names(mapped=True))
    feature_head: str | None = setting(
        None,
        "File with one matrix, the linear mapping of the features; of clip-abc and dino-abc.",
        path=True,
        content=lambda path: file_digest(Path(path)),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.feature_head is None:
            raise ValueError(
                f"feature_head is None: method {self.method!r} expected a file with one matrix. Give --feature_head, "
                f"or take method {TOWER_METHODS[self.method].family!r}, which maps nothing."
            )


def default_tower(method: str, dataset_name: str) -> str | None:
    """The tower that comes with the repository, for the methods and the data set that it was trained for, else None."""
    fits = method in ("clip", "clip-text") and dataset_name == "openmoji" and os.path.isdir(_SHIPPED)
    return os.fspath(_SHIPPED) if fits else None


class Prepared(NamedTuple):
    """The tower, AbC's mapping, features of the data set's images or captions, and the positions of readable images."""

    tower: Tower
    head: FeatureHead | None
    features: JoinedArray
    kept: np.ndarray | None


def prepare(run: Run, config: TowerConfig) -> Prepared:
    """Features of the data set, computed, resumed or reused; one stage for each tower."""
    method = TOWER_METHODS[config.method]
    check_images(run.dataset, config.method)
    tower = load_tower(config.tower, method.family)
    if (tower.tokenizer if method.text else tower.processor) is None:
        half = "text" if method.text else "vision"
        raise ValueError(
            f"tower is {config.tower!r}, which lacks the {half} half that method {config.method!r} needs: expected a "
            f"whole model such as {method.example}"
        )
    # Before the features, which take long.
    head = None
    if isinstance(config, MappedFeatureConfig):
        head = load_head(config.feature_head, tower.module.feature_width())
    fingerprint = tower_fingerprint(config.tower)
    inputs = {**dataset_fingerprints(run), "tower": fingerprint}
    name = f"features/{'captions' if method.text else 'images'}-{fingerprint[:12]}"
    with run.timed("features", run.root.is_finished(name, {}, inputs)):
        if method.text:
            return Prepared(tower, head, dataset_caption_features(run.root, name, inputs, run.dataset, tower), None)
        workers = run.encode_config.workers
        return Prepared(tower, head, *dataset_image_features(run.root, name, inputs, run.dataset, tower, workers))


def score(run: Run, queries: Sequence[QueryJob], config: Any) -> list[Scored]:
    """Cosine similarities of a tower's features of the query and of each training image.

    Images are compared as they are and mirrored, and `config.flips` says what to make of the two. `clip-text` compares
    the query's prompt with the first caption of each image, or with all, the largest counting, as `config.captions`
    says.
    """
    method = TOWER_METHODS[config.method]
    tower, head, features, kept = prepare(run, config)
    with run.timed("query features"):
        if method.text:
            found = text_features(tower, [query.prepared.prompt for query in queries])
            return [Scored(scores) for scores in _text_scores(run.dataset, features, found, config)]
        found = pixel_features(tower, np.stack([query.prepared.image for query in queries]))
    values = cosine_similarities(features, found, head)
    return [Scored(make_scores(run.dataset.row_ids[kept], each[kept], None, config.flips)) for each in values]


def _text_scores(dataset, features, queries, config: TextFeatureConfig) -> list[Scores]:
    first = _first_captions(dataset)
    results = []
    for values in cosine_similarities(features, queries):
        values = values[:, 0]
        score = values[first[:-1]] if config.captions == "first" else np.maximum.reduceat(values, first[:-1])
        results.append(Scores(dataset.row_ids, score))
    return results


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


def dataset_image_features(
    root: StageRoot, name: str, inputs: dict[str, str], dataset: Dataset, tower: Tower, workers: int = 0
) -> tuple[JoinedArray, np.ndarray]:
    """Features of every image and of its mirror image, computed, resumed or reused.

    Args:
      root: where the stage `name` is kept.
      inputs: fingerprints of data set and tower.
      dataset: its images are resized and cropped as the tower's image processor does.
      tower: with a vision half.
      workers: processes that read images, see `encode_to_store`.

    Returns:
      (N, 2, d) float32, on disk, [:, 1] of the mirrored images, and the positions of the images that could be read.
    """
    module, processor = tower.module, tower.processor

    with root.stage(name, {}, inputs) as stage:
        skipped = SkippedRows(stage.path)
        features = encode_to_store(
            make_store(stage.path, "features", (2, module.feature_width()), "float32", len(dataset)),
            _both_views,
            tower.params,
            ImageReader(dataset, (processor.side, processor.side), processor.fit),
            IMAGE_TILE,
            "features of images",
            "image",
            workers=workers,
            store_skipped=skipped.store,
            static=(module, processor),
        )
        skipped.join()
        left_out = dict(run_on_host0(lambda: list(read_skipped(stage.path).items())))
    return features, np.setdiff1d(np.arange(len(dataset)), list(left_out))


def dataset_caption_features(
    root: StageRoot, name: str, inputs: dict[str, str], dataset: Dataset, tower: Tower
) -> JoinedArray:
    """Features of every caption, one image's after another's -> (M, 1, d) float32; as in `dataset_image_features`."""
    captions = [text for index in range(len(dataset)) for text in dataset.captions(index)]
    module, lock = tower.module, threading.Lock()

    def read(rows):
        with lock:  # a tokenizer's padding is state that two threads must not set at once
            return tokenize_prompts(tower.tokenizer, [captions[row] for row in rows]), {}

    with root.stage(name, {}, inputs) as stage:
        return encode_to_store(
            make_store(stage.path, "features", (1, module.feature_width()), "float32", len(captions)),
            _one_view,
            tower.params,
            read,
            TEXT_TILE,
            "features of captions",
            "caption",
            static=(module,),
        )


def _both_views(module: Any, processor: Any, params: Any, batch: Any) -> jax.Array:
    """Images (B, H, W, 3) uint8 -> (B, 2, d), as they are and mirrored."""
    images, _ = batch
    both = [encode_images(module, processor, params, views) for views in (images, images[:, :, ::-1])]
    return jnp.stack(both, axis=1)


def _one_view(module: Any, params: Any, input_ids: jax.Array) -> jax.Array:
    return encode_texts(module, params, input_ids)[:, None]


def _first_captions(dataset: Dataset) -> np.ndarray:
    """(N + 1,) where each image's captions begin among all captions."""
    return np.concatenate([[0], np.cumsum([len(dataset.captions(index)) for index in range(len(dataset))])])
