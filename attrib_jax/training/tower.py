"""Training a small CLIP on a data set's images and captions: the tower of the feature baselines."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.features import image_features, normalise_rows, text_features
from attrib_jax.convert.image_processor import ImageProcessor
from attrib_jax.convert.tokenizer import tokenize_captions, tokenizer_fingerprint
from attrib_jax.convert.tower import Tower, save_tower
from attrib_jax.core.checks import check_range
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.data.readers import TrainingImages, image_side
from attrib_jax.data.sources import Dataset
from attrib_jax.models.clip import CLIPTextConfig
from attrib_jax.models.clip_towers import CLIPConfig, CLIPModel, CLIPVisionConfig
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stages import open_stage
from attrib_jax.training.contrastive import TowerBatch, retrieval_ranks, tower_loss
from attrib_jax.training.loop import FitConfig, fit

_BATCH = 256  # images that the evaluation reads at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig(Settings):
    """Schedule and architecture of a tower that is trained from scratch.

    Beside the settings, which have flags:

    Attributes:
      width, layers, heads: of the vision transformer.
      text_width, text_layers, text_heads: of the text transformer.
      projection_dim: width of the features.
      log_every: steps between two lines of metrics.jsonl.
    """

    steps: int = setting(1000, "Optimiser steps.", low=1, flag="train_steps")
    batch_size: int = setting(96, "Images a step, over all devices.", low=1, flag="train_batch_size")
    learning_rate: float = setting(1.5e-3, "Peak learning rate.", above=0)
    seed: int = setting(0, "Seed of weights, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")
    checkpoint_every: int = setting(250, "Steps between checkpoints.", low=1, performance=True)
    holdout: float = setting(
        0.05,
        "Share of the near-duplicate groups (of the images where there are no groups) that the tower is tested on and "
        "never trained on.",
        low=0,
        high=0.5,
    )

    patch_size: int = setting(16, "Side of the vision transformer's patches.", low=1, unit="pixels")
    largest_shift: int = setting(4, "Largest random shift of a training image.", low=0, unit="pixels")
    mirror: bool = setting(True, "Whether half of the training images are mirrored.")

    width: int = 128
    layers: int = 3
    heads: int = 4
    text_width: int = 128
    text_layers: int = 1
    text_heads: int = 4
    projection_dim: int = 128
    log_every: int = 10

    def __post_init__(self):
        super().__post_init__()
        for name in (*_ARCHITECTURE, "log_every"):
            check_range(name, getattr(self, name), 1, integer=True)

    @property
    def run(self) -> FitConfig:
        """The training run."""
        return FitConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(100, self.steps // 10),
            ema_decay=0.99,
            weight_decay=0.1,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
        )


_ARCHITECTURE = ("width", "layers", "heads", "text_width", "text_layers", "text_heads", "projection_dim")
_DATA_SETTINGS = ("patch_size", "largest_shift", "mirror", "holdout")


class _Pairs:
    """Images with their captions' tokens, for training batches."""

    def __init__(self, dataset: Dataset, rows: np.ndarray, side: int, tokenizer: Any):
        self._images = TrainingImages(dataset, side, rows)
        captions = [dataset.captions(row) for row in rows.tolist()]
        self._input_ids, self._num_captions = tokenize_captions(tokenizer, captions)
        numbers: dict[str, int] = {}
        for row in captions:
            for text in row:
                numbers.setdefault(text.lower(), len(numbers))
        most = self._input_ids.shape[1]
        self._caption_ids = np.array(
            [[numbers[text.lower()] for text in [*row, *[row[0]] * (most - len(row))]] for row in captions], np.int32
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> TowerBatch:
        index, image = self._images(index)
        return TowerBatch(image, self._input_ids[index], self._caption_ids[index], self._num_captions[index])


def train_tower(
    workdir: str | os.PathLike, dataset: Dataset, tokenizer: Any, config: TowerConfig, dtype: Any = None
) -> tuple[Path, dict[str, float]]:
    """Trains what is missing, measures retrieval on the held-out images and writes `<workdir>/tower`.

    The run resumes from its newest checkpoint. Hold the lock of `workdir`.

    Args:
      workdir: folder of the stage `tower_training` and of the result.
      dataset: square images whose side the patch size divides, with captions.
      tokenizer: tokenizer of the text tower, a `transformers.CLIPTokenizer`.
      config: schedule and architecture.
      dtype: dtype of the written weights; float32 if None.

    Returns:
      The tower's folder, see `save_tower`, and the numbers of `retrieval`, which retrieval.json holds too.

    Raises StageMismatchError where the folder holds a run with other settings, another data set or tokenizer.
    """
    settings = {name: getattr(config, name) for name in (*_ARCHITECTURE, *_DATA_SETTINGS)} | {
        "run": config.run.describe()
    }
    # Before anything is stored: images that cannot be trained on should leave nothing behind.
    side = image_side(dataset)
    module = CLIPModel(_clip_config(config, side, tokenizer))
    inputs = {"dataset": dataset.fingerprint(), "tokenizer": tokenizer_fingerprint(tokenizer)}
    stage = open_stage(workdir, "tower_training", settings, inputs)
    held_out = holdout_rows(dataset, config.holdout, config.run.seed)
    rows = np.setdiff1d(np.arange(len(dataset)), held_out)
    key = purpose_key(config.run.seed, "tower weights")
    ids = jnp.zeros((1, tokenizer.model_max_length), jnp.int32)
    params = jax.jit(module.init)(key, jnp.zeros((1, side, side, 3)), ids)["params"]
    loss_fn = functools.partial(tower_loss, module, largest_shift=config.largest_shift, mirror=config.mirror)
    params = fit(stage.path, loss_fn, params, _Pairs(dataset, rows, side, tokenizer), config.run, "train tower")
    tower = Tower("clip", module, params, ImageProcessor(resize=side, crop=side), tokenizer)
    folder = Path(workdir) / "tower"
    save_tower(tower, folder, dtype)
    results = retrieval(tower, dataset, held_out) if len(held_out) else {}
    write_json(Path(workdir) / "retrieval.json", results)
    stage.finish()
    return folder, results


def holdout_rows(dataset: Dataset, share: float, seed: int) -> np.ndarray:
    """Rising positions of the images that are kept from training, in whole near-duplicate groups."""
    groups = np.arange(len(dataset)) if dataset.groups is None else np.asarray(dataset.groups)
    names = np.unique(groups)
    chosen = np.random.default_rng(seed).choice(names, round(share * len(names)), replace=False)
    return np.flatnonzero(np.isin(groups, chosen))


def retrieval(tower: Tower, dataset: Dataset, rows: np.ndarray) -> dict[str, float]:
    """Whether an image finds a caption of its own: share at rank 1 and within 10, and the median rank.

    Args:
      tower: CLIP tower with image and text halves.
      dataset: images with captions.
      rows: positions of the images that are looked up.

    Returns:
      Numbers by name: `recall@1`, `recall@10` and `median_rank` among the captions of these images, the same with
      `_of_all` among the captions of the whole data set; how many `pictures`, `captions` and `captions_of_all`.
    """
    training = TrainingImages(dataset, tower.module.config.vision.image_size, rows)
    # One that cannot be read gives the next one's place.
    found = [training(place) for place in range(len(rows))]
    readable = [place for place, (taken, _) in enumerate(found) if taken == place]
    images = [found[place][1] for place in readable]
    own = [dataset.captions(row) for row in rows[readable].tolist()]
    everyone = [dataset.captions(row) for row in range(len(dataset))]
    features = [
        image_features(tower, np.stack(images[i : i + _BATCH]).astype(np.float32) / 127.5 - 1.0)
        for i in range(0, len(images), _BATCH)
    ]
    vectors = normalise_rows(np.concatenate(features))
    results: dict[str, float] = {"pictures": len(readable)}
    for suffix, pool in (("", own), ("_of_all", everyone)):
        texts = sorted({text for row in pool for text in row})
        similarity = vectors @ normalise_rows(text_features(tower, texts)).T
        place = {text: i for i, text in enumerate(texts)}
        right = np.zeros(similarity.shape, bool)
        for i, row in enumerate(own):
            right[i, [place[text] for text in row]] = True
        ranks = retrieval_ranks(similarity, right)
        results |= {f"captions{suffix}": len(texts), f"median_rank{suffix}": float(np.median(ranks))}
        results |= {f"recall@{k}{suffix}": float(np.mean(ranks <= k)) for k in (1, 10)}
    return results


def _clip_config(config: TowerConfig, side: int, tokenizer: Any) -> CLIPConfig:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=config.projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=side,
        patch_size=config.patch_size,
    )
    return CLIPConfig(text, vision, config.projection_dim)
