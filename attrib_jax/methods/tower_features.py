"""Features of a data set and of queries in a tower, for the methods of `attrib_jax.methods.features`."""

import threading
from collections.abc import Sequence
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
from attrib_jax.core.types import Scores
from attrib_jax.data.readers import ImageReader
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.context import Run, dataset_fingerprints
from attrib_jax.jobs.encode_to_store import encode_to_store, make_store
from attrib_jax.methods.base import QueryJob, Scored
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.joined import JoinedArray
from attrib_jax.storage.skipped import SkippedRows, read_skipped
from attrib_jax.storage.stage_root import StageRoot


class Prepared(NamedTuple):
    """The tower, AbC's mapping, features of the data set's images or captions, and the positions of readable images."""

    tower: Tower
    head: FeatureHead | None
    features: JoinedArray
    kept: np.ndarray | None


def prepare_features(run: Run, config: Any, method: Any) -> Prepared:
    """Features of the data set, computed, resumed or reused; one stage for each tower.

    Raises ValueError where the tower lacks the half that the method needs, or the mapping does not fit it.
    """
    tower = load_tower(config.tower, method.family)
    if (tower.tokenizer if method.text else tower.processor) is None:
        half = "text" if method.text else "vision"
        raise ValueError(
            f"tower is {config.tower!r}, which lacks the {half} half that method {config.method!r} needs: expected a "
            f"whole model such as {method.example}"
        )
    # Before the features, which take long.
    head = None
    if method.mapped:
        head = load_head(config.feature_head, tower.module.feature_width())
    fingerprint = tower_fingerprint(config.tower)
    inputs = {**dataset_fingerprints(run), "tower": fingerprint}
    name = f"features/{'captions' if method.text else 'images'}-{fingerprint[:12]}"
    with run.timed("features", run.root.is_finished(name, {}, inputs)):
        if method.text:
            return Prepared(tower, head, dataset_caption_features(run.root, name, inputs, run.dataset, tower), None)
        workers = run.encode_config.workers
        return Prepared(tower, head, *dataset_image_features(run.root, name, inputs, run.dataset, tower, workers))


def score_features(run: Run, queries: Sequence[QueryJob], config: Any, prepared: Prepared) -> list[Scored]:
    """Cosine similarities of each query's features with those of the data set, see `attrib_jax.methods.features`."""
    tower, head, features, kept = prepared
    with run.timed("query features"):
        if kept is None:
            found = text_features(tower, [query.prepared.prompt for query in queries])
            return [Scored(scores) for scores in _text_scores(run.dataset, features, found, config)]
        found = pixel_features(tower, np.stack([query.prepared.image for query in queries]))
    values = cosine_similarities(features, found, head)
    return [Scored(make_scores(run.dataset.row_ids[kept], each[kept], None, config.flips)) for each in values]


def _text_scores(dataset, features, queries, config: Any) -> list[Scores]:
    first = _first_captions(dataset)
    results = []
    for values in cosine_similarities(features, queries):
        values = values[:, 0]
        score = values[first[:-1]] if config.captions == "first" else np.maximum.reduceat(values, first[:-1])
        results.append(Scores(dataset.row_ids, score))
    return results


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
    return features["features"], np.setdiff1d(np.arange(len(dataset)), list(left_out))


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
        )["features"]


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
