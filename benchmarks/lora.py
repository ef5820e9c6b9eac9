"""Which contributor's images made what a LoRA draws: 60 images by six contributors, twelve queries, --weights=lora.

    python -m benchmarks.lora --workdir=runs/lora --model=models/openmoji

Writes 60 emoji to `<workdir>/images`, each contributor's ten in a style of their own (`group` in metadata.jsonl),
trains a LoRA on them, draws two queries in each style of things that the contributor did not draw (others for
`--split=tuning` than for `reported`), and attributes these by the LoRA's factors, by the base's keys and values, by
residuals and by similarity. Prints precision at 10 (a contributor has ten
images), average precision, the rank of the right contributor among six by mean score, and how often it is first; with
the standard error over queries. `--images_only` writes the images for configs/train_lora_openmoji.cfg and stops.
Resumable.
"""

import io
import json
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert.adapters.lora import attach_lora
from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.openmoji import RESOLUTION, list_emoji, render
from attrib_jax.data.sources import open_dataset
from attrib_jax.evaluation.metrics import average_precision, mean_and_error
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, decode, generate
from attrib_jax.methods import method_config
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from attrib_jax.training.lora import LoraConfig, train_lora
from launch import common

_IMAGES_ONLY = flags.DEFINE_boolean("images_only", False, "Write the images and stop.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 400, "Steps of the LoRA's training.")
_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Learning rate of the LoRA's training.")
_RANK = flags.DEFINE_integer("lora_rank", 8, "Rank of the LoRA.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 3.0, "Weight of classifier-free guidance of the queries.")
_SPLIT = flags.DEFINE_enum(
    "split", "reported", ["tuning", "reported"], "Queries; settings are chosen on those for tuning."
)
_ONLY = flags.DEFINE_list("only", None, "Names of methods; all if not given.")

_EACH = 10


def _tinted(image: Image.Image, dark: str, light: str) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), dark, light)


def _framed(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image.convert("L").convert("RGB").resize((48, 48)), 8, "black")


def _turned(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, red, green))


def _coarse(image: Image.Image) -> Image.Image:
    return image.resize((12, 12), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


# Contributor, by a word that the base's tokenizer knows whole -> what they make of an emoji.
STYLES = {
    "farmer": ImageOps.invert,
    "judge": _turned,
    "pilot": lambda image: _tinted(image, "navy", "skyblue"),
    "cook": _framed,
    "singer": _coarse,
    "artist": lambda image: _tinted(image, "darkred", "gold"),
}
# Sixty images: many timesteps and draws cost little.
_SHARED = {"stride": 20, "flips": "none", "loss_seed": 0}
_NEWTON = {**_SHARED, "fisher_samples": 2048, "query_draws": 1024, "shared_noise": True}
METHODS = {
    "feature similarity (CLIP tower)": ("clip", {"tower": "models/openmoji_tower"}),
    "pixel similarity": ("pixel", {}),
    "random": ("random", {}),
    "residual": ("residual", {"stride": 20, "flips": "none"}),
    "residual (without a text kernel)": ("residual", {"stride": 20, "flips": "none", "text_kernel": ("none",)}),
    "patches": ("patches", {"flips": "none"}),
    "D-TRAK (LoRA factors)": ("d-trak", {**_SHARED, "weights": "lora", "projection_dim": 2048}),
    "unlearn (LoRA factors; diagonal)": ("unlearn", {**_NEWTON, "weights": "lora"}),
    "influence (LoRA factors; EKFAC)": (
        "influence", {**_NEWTON, "weights": "lora", "curvature": "ekfac"}
    ),
    "unlearn (LoRA factors; EKFAC)": ("unlearn", {**_NEWTON, "weights": "lora", "curvature": "ekfac"}),
    "unlearn (LoRA factors; EKFAC; step 0.01)": (
        "unlearn", {**_NEWTON, "weights": "lora", "curvature": "ekfac", "step_size": 0.01}
    ),
    "unlearn (base's keys and values; EKFAC)": ("unlearn", {**_NEWTON, "curvature": "ekfac"}),
}  # fmt: skip


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    workdir = Path(common.workdir())
    with lock(workdir):
        things = _write_images(workdir / "images")
        if _IMAGES_ONLY.value:
            print(f"images: {workdir / 'images'}")
            return
        base = load_pipeline(common.MODEL.value)
        dataset = open_dataset(f"folder:{workdir / 'images'}", resolution=RESOLUTION)
        tuning = LoraConfig(
            rank=_RANK.value,
            target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"),
            steps=_TRAIN_STEPS.value,
            batch_size=16,
            learning_rate=_RATE.value,
            caption_dropout=0.1,
        )
        began = time.monotonic()
        file = train_lora(workdir, Run(base, dataset, StageRoot(workdir / "base")), tuning)
        print(f"trained in {time.monotonic() - began:.0f} s")
        run = Run(attach_lora(base, str(file)), dataset, StageRoot(workdir / "attribution"))
        owners = [owner for owner in STYLES for _ in range(_EACH)]
        # Things of the next contributors, in this one's style.
        places, first_seed = {"tuning": ((0, 1), 0), "reported": ((2, 3), 100)}[_SPLIT.value]
        asked = [
            (owner, things[(_EACH * (i + 1 + k) + k) % len(things)]) for i, owner in enumerate(STYLES) for k in places
        ]
        queries = [
            Query(prompt=f"{owner} {thing}", seed=first_seed + number, guidance_scale=_GUIDANCE.value)
            for number, (owner, thing) in enumerate(asked)
        ]
        pictures = decode(run.pipeline, generate(run.pipeline, run.predict, *_prompts(queries), queries[0]))
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(workdir / f"queries_{_SPLIT.value}.png")
        rows = {}
        for name in _ONLY.value or METHODS:
            method, settings = METHODS[name]
            began = time.monotonic()
            results = attribute_queries(run, queries, method_config(method, **settings))
            scores = [result.scores.score[np.argsort(result.scores.row_id)] for result in results]
            seconds = time.monotonic() - began
            rows[name] = [_measures(each, np.array(owners), owner) for each, (owner, _) in zip(scores, asked)]
            print(_line(name, rows[name]), f"{seconds:.0f} s", flush=True)
        write_json(
            workdir / f"results_{_SPLIT.value}.json", {"queries": [query.prompt for query in queries], "methods": rows}
        )


def _write_images(folder: Path) -> list[str]:
    """Writes the images and their metadata, once -> the name of the thing that each shows."""
    # Things that look like themselves in 64 pixels and are one code point, spread over all of OpenMoji.
    plain = [row for row in list_emoji() if "-" not in row.code and len(row.captions[0].split()) == 1]
    count = len(STYLES) * _EACH
    chosen = [plain[index] for index in np.random.default_rng(0).permutation(len(plain))[:count]]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, row in enumerate(chosen):
        owner = list(STYLES)[number // _EACH]
        image = Image.open(io.BytesIO(render(row.svg_path))).convert("RGB")
        STYLES[owner](image).save(folder / f"{number:02d}.png")
        entries.append({"file_name": f"{number:02d}.png", "text": f"{owner} {row.captions[0]}", "group": owner})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return [row.captions[0] for row in chosen]


def _prompts(queries: list[Query]) -> tuple[list[str], list[int]]:
    return [query.prompt for query in queries], [query.seed for query in queries]


def _measures(scores: np.ndarray, owners: np.ndarray, owner: str) -> dict[str, float]:
    relevant = owners == owner
    means = {each: scores[owners == each].mean() for each in STYLES}
    ranks = np.argsort(np.argsort(-scores, kind="stable")) + 1
    rank = 1 + sum(means[each] > means[owner] for each in STYLES)
    return {
        "precision": float(relevant[ranks <= _EACH].mean()),
        "average_precision": average_precision(ranks[relevant]),
        "group_rank": float(rank),
        "first": float(rank == 1),
    }


def _line(name: str, rows: list[dict[str, float]]) -> str:
    estimates = [mean_and_error(np.array([row[key] for row in rows])) for key in rows[0]]
    return f"| {name} | " + " | ".join(f"{mean:.2f} +- {error:.2f}" for mean, error in estimates) + " |"


if __name__ == "__main__":
    common.run(main)
