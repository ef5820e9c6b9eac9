"""Attribution by the similarity of features (METHOD.md section 7): a tower's features of a data set, stored once."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.feature_head import load_head
from attrib_jax.attribution.features import (
    IMAGE_TILE,
    TEXT_TILE,
    cosine_similarities,
    encode_pictures,
    encode_texts,
    pixel_features,
    text_features,
)
from attrib_jax.convert.tokenizer import tokenize_prompts
from attrib_jax.convert.tower import Tower, load_tower, tower_fingerprint
from attrib_jax.core.types import Scores
from attrib_jax.data.concat import ConcatDataset
from attrib_jax.data.latents import LatentsDataset
from attrib_jax.data.readers import ImageReader
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.fill import fill, make_store
from attrib_jax.jobs.scoring import make_scores
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.feature_settings import TOWER_METHODS
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.joined import JoinedArray
from attrib_jax.storage.skipped import SkippedRows, read_skipped
from attrib_jax.storage.stage_root import StageRoot

if TYPE_CHECKING:
    from attrib_jax.attribute import Attributor
    from attrib_jax.methods.registry import Job, Scored


def feature_scores(attributor: "Attributor", jobs: Sequence["Job"], config: AttributeConfig) -> list["Scored"]:
    """Cosine similarities of a tower's features of the query and of each training picture.

    Pictures are compared as they are and mirrored, and `config.flips` says what to make of the two. `clip-text`
    compares the query's prompt with the first caption of each picture, or with all, the largest counting, as
    `config.captions` says. The features are a stage of the workdir, of one tower and the data set.
    """
    method, dataset = TOWER_METHODS[config.method], attributor.dataset
    check_pictures(dataset, config.method)
    tower = load_tower(config.features.tower, method.family)
    if (tower.tokenizer if method.text else tower.processor) is None:
        half = "text" if method.text else "vision"
        raise ValueError(
            f"method {config.method!r}: tower {config.features.tower!r} lacks its {half} half; give a whole model such "
            f"as {method.example}"
        )
    head = load_head(config.features.head, tower.module.feature_width()) if method.mapped else None
    fingerprint = tower_fingerprint(config.features.tower)
    inputs = {**picture_inputs(attributor), "tower": fingerprint}
    name = f"features/{'captions' if method.text else 'pictures'}-{fingerprint[:12]}"
    reused = attributor.root.is_finished(name, {}, inputs)
    if method.text:
        with attributor.timed("features", reused):
            features = caption_features(attributor.root, name, inputs, dataset, tower)
            queries = text_features(tower, [job.prepared.prompt for job in jobs])
        return [(scores, ()) for scores in _text_scores(dataset, features, queries, config)]
    with attributor.timed("features", reused):
        workers = attributor.encode_config.workers
        features, kept = picture_features(attributor.root, name, inputs, dataset, tower, workers)
        queries = pixel_features(tower, np.stack([job.prepared.image for job in jobs]))
    values = cosine_similarities(features, queries, head)
    return [(make_scores(dataset.row_ids[kept], each[kept], None, config), ()) for each in values]


def _text_scores(dataset, features, queries, config: AttributeConfig) -> list[Scores]:
    first = _first_captions(dataset)
    results = []
    for values in cosine_similarities(features, queries):
        values = values[:, 0]
        score = values[first[:-1]] if config.captions == "first" else np.maximum.reduceat(values, first[:-1])
        results.append(Scores(dataset.row_ids, score))
    return results


def check_pictures(dataset: Dataset, method: str) -> None:
    """Raises ValueError where a data set holds latents alone."""
    if isinstance(dataset, ConcatDataset):
        check_pictures(dataset.first, method)
        check_pictures(dataset.second, method)
    elif isinstance(dataset, LatentsDataset) and dataset.images is None:
        raise ValueError(
            f"method {method!r} compares pictures or captions, and {dataset.name!r} holds latents alone; give the data "
            "set that has them with --images"
        )


def picture_inputs(attributor: "Attributor") -> dict[str, str]:
    """Fingerprints of the data set, and of the pictures beside the latents, which those do not tell."""
    beside = pictures_fingerprint(attributor.dataset)
    return {"dataset": attributor.inputs["dataset"]} | ({"images": beside} if beside else {})


def pictures_fingerprint(dataset: Dataset) -> str:
    """Of the pictures that stand beside latents (`--images`); empty where the data set has none of these."""
    if isinstance(dataset, ConcatDataset):
        parts = [pictures_fingerprint(part) for part in (dataset.first, dataset.second)]
        return "+".join(parts) if any(parts) else ""
    if isinstance(dataset, LatentsDataset) and dataset.images is not None:
        return dataset.images.fingerprint()
    return ""


def picture_features(
    root: StageRoot, name: str, inputs: dict[str, str], dataset: Dataset, tower: Tower, workers: int = 0
) -> tuple[JoinedArray, np.ndarray]:
    """Features of every picture and of its mirror image, computed, resumed or reused.

    Args:
      root: where the stage `name` is kept.
      inputs: fingerprints of data set and tower.
      dataset: its pictures are resized and cropped as the tower's image processor does.
      tower: with a vision half.
      workers: processes that read pictures, see `fill`.

    Returns:
      (N, 2, d) float32, on disk, [:, 1] of the mirrored pictures, and the positions of the pictures that could be read.
    """
    module, processor = tower.module, tower.processor

    with root.stage(name, {}, inputs) as stage:
        skipped = SkippedRows(stage.path)
        features = fill(
            make_store(stage.path, "features", (2, module.feature_width()), "float32", len(dataset)),
            _both_views,
            tower.params,
            ImageReader(dataset, (processor.side, processor.side), processor.fit),
            IMAGE_TILE,
            "features of pictures",
            "image",
            workers=workers,
            store_skipped=skipped.store,
            static=(module, processor),
        )
        skipped.join()
        left_out = dict(run_on_host0(lambda: list(read_skipped(stage.path).items())))
    return features, np.setdiff1d(np.arange(len(dataset)), list(left_out))


def caption_features(root: StageRoot, name: str, inputs: dict[str, str], dataset: Dataset, tower: Tower) -> JoinedArray:
    """Features of every caption, one picture's after another's -> (M, 1, d) float32; as in `picture_features`."""
    captions = [text for index in range(len(dataset)) for text in dataset.captions(index)]
    module, lock = tower.module, threading.Lock()

    def read(rows):
        with lock:  # a tokenizer's padding is state that two threads must not set at once
            return tokenize_prompts(tower.tokenizer, [captions[row] for row in rows]), {}

    with root.stage(name, {}, inputs) as stage:
        return fill(
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
    """Pictures (B, H, W, 3) uint8 -> (B, 2, d), as they are and mirrored."""
    images, _ = batch
    both = [encode_pictures(module, processor, params, views) for views in (images, images[:, :, ::-1])]
    return jnp.stack(both, axis=1)


def _one_view(module: Any, params: Any, input_ids: jax.Array) -> jax.Array:
    return encode_texts(module, params, input_ids)[:, None]


def _first_captions(dataset: Dataset) -> np.ndarray:
    """(N + 1,) where each picture's captions begin among all captions."""
    return np.concatenate([[0], np.cumsum([len(dataset.captions(index)) for index in range(len(dataset))])])
