"""Draws training captions and looks whether the nearest training image, by a feature tower, is one of the caption's.

python -m benchmarks.caption_retrieval --model=models/openmoji --tower=models/openmoji_tower

An image belongs to a caption where it is in the near-duplicate group of the image that the caption was taken from. The
share is told for all captions and for those whose image has no near-duplicates (objects, animals, flags, signs): a
model that has learned people and hands alone finds the first but not these.
"""

import json

import numpy as np
from absl import flags

from attrib_jax.attribution.features import IMAGE_TILE, normalise_rows, pixel_features
from attrib_jax.convert.tower import load_tower
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, decode, generate
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.progress import progress
from launch import common

_TOWER = flags.DEFINE_string("tower", "models/openmoji_tower", "Feature tower: a transformers folder.")
_COUNT = flags.DEFINE_integer("count", 300, "Random training captions to draw.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of captions; caption i is drawn with seed + i.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "Weight of classifier-free guidance.", lower_bound=0)
_TOP = flags.DEFINE_integer("top", 5, "How many of the nearest images count in the second number.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the numbers.")


def main():
    common.require(model=common.MODEL.value)
    pipeline, tower = common.load_model(), load_tower(_TOWER.value)
    dataset = common.load_dataset(image_resolution(pipeline))
    if dataset.groups is None:
        raise ValueError(f"dataset {dataset.name!r} has no near-duplicate groups; expected one that has, as openmoji")
    groups = np.asarray(dataset.groups)
    random = np.random.default_rng(_SEED.value)
    rows = random.choice(len(dataset), min(_COUNT.value, len(dataset)), replace=False)
    captions = [str(random.choice(dataset.captions(row))) for row in rows.tolist()]
    seeds = [_SEED.value + place for place in range(len(rows))]

    settings = Query("", guidance_scale=_GUIDANCE.value)
    latents = generate(pipeline, predictor(pipeline.unet), captions, seeds, settings)
    drawn = _features(tower, lambda places: decode(pipeline, latents[places]), len(rows), "features of drawn images")
    training = _features(
        tower,
        lambda places: np.stack([dataset[place].image for place in places.tolist()]),
        len(dataset),
        "features of training images",
    )
    nearest = np.argsort(-(drawn @ training.T), axis=1, kind="stable")[:, : _TOP.value]
    own = groups[nearest] == groups[rows][:, None]
    alone = np.isin(groups[rows], np.flatnonzero(np.bincount(groups) == 1))
    results = {"captions": len(rows), **_shares(own), "captions_without_variants": int(alone.sum())}
    results |= {f"{name}_without_variants": value for name, value in _shares(own[alone]).items()}
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    if _OUTPUT.value is not None:
        with open(_OUTPUT.value, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


def _shares(own: np.ndarray) -> dict[str, float]:
    if not len(own):
        return {}
    return {"first": float(own[:, 0].mean()), f"among_{own.shape[1]}": float(own.any(axis=1).mean())}


def _features(tower, read, count: int, description: str) -> np.ndarray:
    """Features at unit length (count, d) of the images that `read` gives for positions."""
    parts, size = [], 16 * IMAGE_TILE
    with progress(count, description, "image") as bar:
        for first in range(0, count, size):
            places = np.arange(first, min(first + size, count))
            parts.append(pixel_features(tower, read(places)))
            bar.update(len(places))
    return normalise_rows(np.concatenate(parts))


if __name__ == "__main__":
    common.run(main, one_host=True)
