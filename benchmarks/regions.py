"""Region attribution on generated images with two objects: does each region find the images of its own object?

    python -m benchmarks.regions --model=models/openmoji --workdir=runs/regions --output=docs/regions.png

Each image is attributed twice, by the box around a thing and by the box around the person or people. Training
images are sorted by the words of their captions: of the thing alone, of people alone, of both. For each region the
table gives the shares of these among the top 20, and the median rank of all that show one, the other or both. Most of
what made an image made both of its parts, so the regions are also compared with each other: `contrast` is the
probability that, of an image that shows the thing and one of people alone, the first gains more by the thing's region
than by the people's; 0.5 if the regions say the same. Resumable region by region; the sheet shows for each region the
best image of each group of near-duplicates, then those that it has before the other region.
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert.load import load_pipeline
from attrib_jax.core.types import ranking
from attrib_jax.data.sources import open_dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.jobs.settings import SCORES
from attrib_jax.methods import method_config
from attrib_jax.methods.base import Attribution
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_OUTPUT = flags.DEFINE_string("output", "docs/regions.png", "PNG file of the regions and their top images.")
_SCORE = flags.DEFINE_enum("score", "exact", SCORES, "Exact or linearised scores.")
_STRIDE = flags.DEFINE_integer("stride", 100, "Distance of the timesteps of the scores.")
_FLIPS = flags.DEFINE_enum("flips", "none", ["none", "max"], "How mirror images count in the scores.")
_DRAWS = flags.DEFINE_integer("query_draws", 4096, "Draws of a query's gradient.")

_TOP = 20
_SHOWN = 8
_PEOPLE = r"man|men|woman|women|person|people|boy|girl|couple|family|kiss|adult|baby|child|technologist|hair|face"


class Scene(NamedTuple):
    """A generated image of a thing and people, and the boxes (x0, y0, x1, y1) around each."""

    prompt: str
    seed: int
    thing: str
    words: str
    thing_box: tuple[int, int, int, int]
    person_box: tuple[int, int, int, int]


SCENES = (
    # OpenMoji draws its heart above a kiss, too.
    Scene("couple with heart woman man", 0, "heart", "heart|hearts|love|kiss", (22, 4, 42, 25), (2, 25, 62, 56)),
    Scene("person biking", 0, "bicycle", "biking|bicycle|bicycles|cyclist|scooter", (4, 34, 60, 58), (18, 4, 44, 34)),
)


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    config = method_config(score=_SCORE.value, stride=_STRIDE.value, flips=_FLIPS.value, query_draws=_DRAWS.value)
    captions = [" ".join(dataset.captions(row)).lower() for row in range(len(dataset))]
    people = _matches(captions, _PEOPLE)
    rows, table = [], []
    with lock(common.workdir()):
        run = Run(pipeline, dataset, StageRoot(common.workdir(), common.shipped_stages()))
        for scene in SCENES:
            things = _matches(captions, scene.words)
            query = Query(prompt=scene.prompt, seed=scene.seed, guidance_scale=2.0)
            boxes = {scene.thing: scene.thing_box, "people": scene.person_box}
            results = [
                attribute_queries(run, [query], dataclasses.replace(config, region=box))[0] for box in boxes.values()
            ]
            gains = standardised(results[0].scores.score) - standardised(results[1].scores.score)
            for (name, box), result, own in zip(boxes.items(), results, (gains, -gains)):
                rows.append(Line(result, box, f"{scene.prompt}: {name}", own))
                row = {"image": scene.prompt, "region": name, **summary(result.scores, things, people)}
                table.append(row | {"contrast": contrast(gains, things, people)})
            write_json(run.root.workdir / "regions.json", table)
    _draw(rows, dataset).save(_OUTPUT.value, optimize=True)
    print(_table(table))


def _matches(captions: list[str], words: str) -> np.ndarray:
    """(N,) bool: which captions have one of the words, given as alternatives of a pattern."""
    pattern = re.compile(rf"\b({words})\b")
    return np.array([pattern.search(caption) is not None for caption in captions])


def summary(scores, things: np.ndarray, people: np.ndarray) -> dict[str, float]:
    """Shares of the top by what captions name, and median ranks of images of the thing, of people and of both.

    Args:
      scores: `Scores` of all images, in the order of the data set.
      things, people: (N,) bool, whose captions name the scene's thing, and people.
    """
    order = ranking(scores.score, scores.row_id)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    top = order[:_TOP]
    alone, without = things & ~people, people & ~things
    return {
        "top thing alone": float(alone[top].mean()),
        "top both": float((things & people)[top].mean()),
        "top people alone": float(without[top].mean()),
        "median rank both": float(np.median(rank[things & people])),
        "median rank thing alone": float(np.median(rank[alone])),
        "median rank people alone": float(np.median(rank[without])),
    }


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores (N,) of mean 0 and standard deviation 1."""
    return (scores - scores.mean()) / scores.std()


def contrast(gains: np.ndarray, things: np.ndarray, people: np.ndarray) -> float:
    """The share of pairs of an image with the thing and one of people alone in which the first gains more.

    Args:
      gains: (N,) standardised scores by the thing's region minus those by the people's.
      things, people: (N,) bool, whose captions name the scene's thing, and people.
    """
    either = things | people
    return float(roc_auc_score(things[either], gains[either]))


class Line(NamedTuple):
    """A region's line of the sheet; `gains` (N,) are its standardised scores over those of the other region."""

    result: Attribution
    box: tuple[int, int, int, int]
    title: str
    gains: np.ndarray


def _draw(lines: list[Line], dataset) -> Image.Image:
    """The image with its box, the best of each group of near-duplicates, then of those that gain by this region."""
    size, gap, label, wide = 64, 4, 14, 16
    width, height = (2 * _SHOWN + 1) * (size + gap) + 2 * wide, size + label + gap
    sheet = Image.new("RGB", (width, height * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        y, second = number * height, size + wide + _SHOWN * (size + gap) + wide
        draw.text((2, y), line.title, fill="black")
        draw.text((second, y), "gain most by this region", fill="black")
        y += label
        sheet.paste(Image.fromarray(line.result.query.image), (0, y))
        x0, y0, x1, y1 = line.box
        draw.rectangle((x0, y + y0, x1 - 1, y + y1 - 1), outline="#b23a1e", width=2)
        for order, x in ((np.argsort(-line.result.scores.score), size + wide), (np.argsort(-line.gains), second)):
            for place, row in enumerate(_best_of_groups(order, dataset.groups)):
                sheet.paste(Image.fromarray(dataset[row].image), (x + place * (size + gap), y))
    return sheet.quantize(128, dither=Image.Dither.NONE)


def _best_of_groups(order: np.ndarray, groups: np.ndarray) -> list[int]:
    """The first of each group of near-duplicates."""
    _, first = np.unique(groups[order], return_index=True)
    return order[np.sort(first)[:_SHOWN]].tolist()


def _table(table: list[dict]) -> str:
    keys = list(table[0])
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += [f"| {' | '.join(x if isinstance(x, str) else f'{x:g}' for x in row.values())} |" for row in table]
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
