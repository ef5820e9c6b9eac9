"""Region attribution on generated pictures with two objects: does each region find the pictures of its own object?

    python -m benchmarks.regions --model=models/openmoji --workdir=runs/regions --output=docs/regions.png

Each picture is attributed twice, by the box around a thing and by the box around the person or people. Training
pictures are sorted by the words of their captions: of the thing alone, of people alone, of both. For each region the
table gives the shares of these among the top 20, and the median rank of all that show one, the other or both. Resumable
region by region; writes the regions and the best picture of each group of near-duplicates as a sheet.
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.data.sources import open_dataset
from attrib_jax.runtime.files import write_json
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributed, Attributor
from attrib_jax.stages.config import SCORES, AttributeConfig
from attrib_jax.stages.query import Query
from attrib_jax.stages.root import StageRoot
from launch import common

_OUTPUT = flags.DEFINE_string("output", "docs/regions.png", "PNG of the regions and their top pictures.")
_SCORE = flags.DEFINE_enum("score", "exact", SCORES, "See launch.attribute.")
_STRIDE = flags.DEFINE_integer("stride", 250, "Timesteps of the scores.")
_FLIPS = flags.DEFINE_enum("flips", "none", ["none", "max"], "Mirror images in the scores.")
_DRAWS = flags.DEFINE_integer("query_draws", 1024, "Draws of a query's gradient.")

_TOP = 20
_SHOWN = 8
_PEOPLE = r"man|men|woman|women|person|people|boy|girl|couple|family|kiss|adult|baby|child|technologist|hair|face"


class Scene(NamedTuple):
    """A generated picture of a thing and people, and the boxes (x0, y0, x1, y1) around each."""

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
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    config = AttributeConfig(score=_SCORE.value, stride=_STRIDE.value, flips=_FLIPS.value, query_draws=_DRAWS.value)
    captions = [" ".join(dataset.captions(row)).lower() for row in range(len(dataset))]
    people = _matches(captions, _PEOPLE)
    rows, table = [], []
    with lock(common.WORKDIR.value):
        attributor = Attributor(pipeline, dataset, StageRoot(common.WORKDIR.value, common.shipped_stages()))
        for scene in SCENES:
            things = _matches(captions, scene.words)
            query = Query(prompt=scene.prompt, seed=scene.seed, guidance_scale=2.0)
            for name, box in ((scene.thing, scene.thing_box), ("people", scene.person_box)):
                result = attributor.attribute(query, dataclasses.replace(config, region=box))
                rows.append((result, box, f"{scene.prompt}: {name}"))
                table.append({"picture": scene.prompt, "region": name, **summary(result.scores, things, people)})
                write_json(attributor.root.workdir / "regions.json", table)
    _draw(rows, dataset).save(_OUTPUT.value, optimize=True)
    print(_table(table))


def _matches(captions: list[str], words: str) -> np.ndarray:
    """(N,) bool: which captions have one of the words, given as alternatives of a pattern."""
    pattern = re.compile(rf"\b({words})\b")
    return np.array([pattern.search(caption) is not None for caption in captions])


def summary(scores, things: np.ndarray, people: np.ndarray) -> dict[str, float]:
    """Shares of the top by what captions name, and median ranks of pictures of the thing, of people and of both.

    Args:
      scores: `Scores` of all pictures, in the order of the data set.
      things, people: (N,) bool, whose captions name the scene's thing, and people.
    """
    order = np.lexsort((scores.row_id, -scores.score))
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


def _draw(rows: list[tuple[Attributed, tuple, str]], dataset) -> Image.Image:
    """A line for each region: the picture with its box, then the best picture of each group of near-duplicates."""
    size, gap, label = 64, 4, 14
    width, height = (_SHOWN + 1) * (size + gap) + 12, size + label + gap
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (result, box, title) in enumerate(rows):
        y = line * height
        draw.text((2, y), title, fill="black")
        y += label
        sheet.paste(Image.fromarray(result.query.image), (0, y))
        x0, y0, x1, y1 = box
        draw.rectangle((x0, y + y0, x1 - 1, y + y1 - 1), outline="#b23a1e", width=2)
        order, seen, x = result.scores.top().row_id, set(), size + gap + 12
        for row in order:
            group = int(dataset.groups[row])
            if group in seen:
                continue
            seen.add(group)
            sheet.paste(Image.fromarray(dataset[int(row)].image), (x, y))
            x += size + gap
            if len(seen) == _SHOWN:
                break
    return sheet.quantize(128, dither=Image.Dither.NONE)


def _table(table: list[dict]) -> str:
    keys = list(table[0])
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += [f"| {' | '.join(x if isinstance(x, str) else f'{x:g}' for x in row.values())} |" for row in table]
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
