"""The Customized-Model benchmark: are the images that a model was customised on found among many others?

METHOD.md sections 6, 8 and 9. Every case is a model customised by Custom Diffusion on a few exemplars, and an image
that it made. The exemplars are the answer; the images they are hidden among are the base model's. Each case is asked
with its prompt, and with that prompt without the new word V*.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import check_range
from attrib_jax.core.fingerprint import digest
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.text import read_text
from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError, read_image
from attrib_jax.data.latents import LatentsDataset
from attrib_jax.data.protocol import Row
from attrib_jax.data.sources import ArrayDataset, Dataset
from attrib_jax.evaluation.metrics import average_precision, mean_and_error, recall_at
from attrib_jax.evaluation.named import has_cascade, score_queries
from attrib_jax.evaluation.tables import write_table
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import EncodeConfig, image_resolution
from attrib_jax.jobs.query import Query
from attrib_jax.jobs.settings import CurvatureSettings
from attrib_jax.methods.base import MethodConfig
from attrib_jax.storage.files import make_folder, write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock

_log = logging.getLogger(__name__)

_KEYS = ("model_path", "synth_image_path", "prompt", "train_prompt", "test_case", "test_case_ind", "category")
_LISTED = 10
# What published lists call their own folder.
_DATA_ROOT = "dataset/"


class Case(NamedTuple):
    """One query of one customised model.

    Attributes:
      model: folder or file of its Custom Diffusion weights.
      image: the image that it made.
      prompt: of that image; holds the new word.
      train_prompt: caption of the exemplars.
      exemplars: the images that the model was customised on.
      category: such as `object` or `style`.
    """

    model: Path
    image: Path
    prompt: str
    train_prompt: str
    exemplars: tuple[Path, ...]
    category: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomizedConfig(Settings):
    """Which customised models are asked, and among which images their exemplars are looked for."""

    cases: str | None = setting(
        None, "Task list in the layout of the Customized-Model benchmark, see `read_cases`.", path=True
    )
    cases_root: str | None = setting(
        None, "Folder that the paths of the task list are relative to; its own if not given.", path=True
    )
    token: str = setting("<new1>", "New word V* of the models, left out in the second form of each prompt.")
    rows: int = setting(0, "Random images of the data set that exemplars are hidden among; 0 for all of them.", low=0)
    recall_k: int = setting(10, "Rank k of recall@k.", low=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.token:
            raise ValueError("token is '': expected the new word of the models, such as <new1>. Change token.")


def read_cases(file: str | os.PathLike, root: str | os.PathLike | None = None) -> list[Case]:
    """Reads a task list in the layout of the benchmark (METHOD.md section 9).

    The list has entries with `model_path`, `synth_image_path`, `prompt`, `train_prompt`, `test_case`, `test_case_ind`
    and `category`. `test_case` is a json file, or, as in the published lists, the name of one in `json/` without its
    ending: a list of cases with an `exemplar` list of image paths, of which `test_case_ind` says which. A leading
    `dataset/` of these paths, which the published ones have, stands for the root.

    Args:
      file: the task list.
      root: folder that its paths are relative to; its own if None.

    Raises:
      FileNotFoundError: the list, or files that it names, do not exist; the first ones are listed.
      ValueError: it is no such list.
    """
    root = Path(file).parent if root is None else Path(root)
    tasks = _read_list(file)
    cases, lists = [], {}
    for number, task in enumerate(tasks, start=1):
        missing = [key for key in _KEYS if not isinstance(task, dict) or key not in task]
        if missing:
            raise ValueError(f"{file}: entry {number} lacks {', '.join(missing)}")
        place = _find(root, task["test_case"], f"json/{task['test_case']}.json")
        lists[place] = lists[place] if place in lists else _read_list(place)
        try:
            exemplars = lists[place][int(task["test_case_ind"])]["exemplar"]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: entry {number} has test_case_ind {task['test_case_ind']!r}, but {place} has no case with an "
                f"exemplar list there ({len(lists[place])} cases)"
            ) from error
        cases.append(
            Case(
                root / task["model_path"],
                root / task["synth_image_path"],
                task["prompt"],
                task["train_prompt"],
                tuple(_find(root, path, str(path).removeprefix(_DATA_ROOT)) for path in exemplars),
                task["category"],
            )
        )
    if not cases:
        raise ValueError(f"{file} lists no case")
    needed = dict.fromkeys(path for case in cases for path in (case.model, case.image, *case.exemplars))
    absent = [os.fspath(path) for path in needed if not path.exists()]
    if absent:
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise FileNotFoundError(
            f"{file} names files that do not exist: {', '.join(absent[:_LISTED])}{more}. Paths are relative to {root}."
        )
    return cases


def _find(root: Path, path: str, published: str) -> Path:
    """`path` below `root`, or what stands for it in published files if only that exists."""
    places = root / path, root / published
    return places[1] if places[1].exists() and not places[0].exists() else places[0]


def _read_list(file: str | os.PathLike) -> list:
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, it is not valid JSON ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a list of cases")
    return content


def run_customized(
    workdir: str | os.PathLike,
    base: Pipeline,
    dataset: Dataset,
    methods: Mapping[str, MethodConfig],
    config: CustomizedConfig,
    encode_config: EncodeConfig = EncodeConfig(),
) -> str:
    """Ranks of every case's exemplars among them and images of `dataset`, by every method -> a markdown table.

    Each model has a workdir of its own below `workdir`, resumed there. At the end every rank is kept in `records.json`;
    means with standard errors over models are in `customized.csv`, see `write_table`. EKFAC has no file to come from:
    it is fitted for each model.

    Raises ValueError where a method needs the base model's Fisher information and has none, or has a cascade, or a
    prompt lacks V*.
    """
    for name, each in methods.items():
        if isinstance(each, CurvatureSettings) and getattr(each, "update", "newton") == "newton":
            if (each.curvature, each.fisher) == ("diagonal", None):
                raise ValueError(f"method {name!r} has no fisher; give that of the base model, which all models share")
        if has_cascade(each):
            raise ValueError(f"method {name!r} has a cascade, which may leave exemplars without a rank; leave it out")
    if config.cases is None:
        raise ValueError("cases is None: expected the file of a task list. Give --cases.")
    cases, rest = read_cases(config.cases, config.cases_root), random_rows(dataset, config.rows)
    for case in cases:
        if without_word(case.prompt, config.token) == " ".join(case.prompt.split()):
            raise ValueError(
                f"prompt {case.prompt!r} does not hold the word {config.token!r}; give the new word of the models as "
                "token, so that both forms of the prompt are asked"
            )
    folder = make_folder(Path(workdir) / "evaluation" / "customized")
    resolution = image_resolution(base)
    grouped = _by_model(cases)
    # Before anything is written: an image that cannot be read should not cost an earlier run's records.
    exemplars_of = {model: _exemplars(members[0], resolution) for model, members in grouped.items()}
    records, table = [], ""
    for model, members in grouped.items():
        pipeline = apply_custom_diffusion(base, os.fspath(model))
        exemplars = exemplars_of[model]
        place = Path(workdir) / "models" / _name(model)
        make_folder(place)
        with lock(place):
            run = Run(pipeline, concatenate(exemplars, rest), StageRoot(place), encode_config)
            for form, strip in (("with V*", False), ("without V*", True)):
                queries = [
                    Query(without_word(case.prompt, config.token) if strip else case.prompt, image=case.image)
                    for case in members
                ]
                for method, settings in methods.items():
                    label = "token" if form == "with V*" else "no-token"
                    results = score_queries(run, settings, queries, place / "queries" / f"{method}-{label}")
                    records += [
                        {
                            "model": _name(model),
                            "category": case.category,
                            "prompt": case.prompt,
                            "method": method,
                            "form": form,
                            "ranks": [scores.rank_of(int(row)) for row in exemplars.row_ids],
                        }
                        for case, scores in zip(members, results)
                    ]
        finished = model == list(grouped)[-1]
        if finished:
            write_json(folder / "records.json", records)
        table = write_table(folder, "customized", summary(records, config.recall_k), finished)
    return f"{len(grouped)} models, {len(cases)} queries, among {len(rest)} other images\n\n{table}"


def random_rows(dataset: Dataset, count: int, seed: int = 2024) -> Dataset:
    """`count` random rows of a data set in its order, their row ids kept; all of it for 0.

    Images that cannot be read are passed over. Raises ValueError for more rows than there are, or a data set of
    latents, whose images would be encoded again.
    """
    if not count:
        return dataset
    if isinstance(dataset, LatentsDataset):
        raise ValueError(f"rows is {count}, but {dataset.name!r} holds latents, which are taken whole; give rows=0")
    check_range("rows", count, 1, len(dataset), integer=True)
    readable: dict[int, Row] = {}
    for row in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        try:
            readable[row] = dataset[row]
        except UnreadableRowError as error:
            _log.warning("%s: another image takes its place", error)
        if len(readable) == count:
            break
    else:
        raise ValueError(f"rows is {count}, but only {len(readable)} images of {dataset.name!r} can be read")
    rows = np.sort(list(readable))
    taken = [readable[row] for row in rows.tolist()]
    return ArrayDataset(
        np.stack([row.image for row in taken]),
        [row.captions for row in taken],
        row_ids=np.array([row.row_id for row in taken], np.int32),
        groups=None if dataset.groups is None else np.asarray(dataset.groups)[rows],
        name=f"{dataset.name} ({len(rows)} rows)",
    )


def summary(records: Sequence[Mapping], k: int) -> list[dict]:
    """A row for each method and form: recall@k and mAP, means over the queries of a model, then over models."""
    rows = []
    for method, form in dict.fromkeys((record["method"], record["form"]) for record in records):
        mine = [record for record in records if (record["method"], record["form"]) == (method, form)]
        row = {"method": method, "prompt": form}
        for name, metric in ((f"recall@{k}", lambda ranks: recall_at(ranks, k)), ("mAP", average_precision)):
            per_model: dict[str, list[float]] = {}
            for record in mine:
                per_model.setdefault(record["model"], []).append(metric(record["ranks"]))
            estimate = mean_and_error(np.array([np.mean(values) for values in per_model.values()]))
            row |= {name: estimate.mean, f"{name} error": estimate.error}
        rows.append(row | {"median rank": float(np.median(np.concatenate([record["ranks"] for record in mine])))})
    return rows


def _by_model(cases: Sequence[Case]) -> dict[Path, list[Case]]:
    grouped: dict[Path, list[Case]] = {}
    for case in cases:
        grouped.setdefault(case.model, []).append(case)
    for model, members in grouped.items():
        if len({(case.exemplars, case.train_prompt) for case in members}) > 1:
            raise ValueError(f"the cases of model {model} have different exemplars or train_prompts; expected one set")
    return grouped


def _exemplars(case: Case, resolution: int) -> Dataset:
    images = np.stack([read_image(path, resolution, resolution) for path in case.exemplars])
    return ArrayDataset(images, [[case.train_prompt]] * len(images), name="exemplars")


def without_word(prompt: str, token: str) -> str:
    """A prompt without a word, which punctuation may follow."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt).split())


def _name(model: Path) -> str:
    return f"{model.stem or 'model'}-{digest(os.fspath(model))[:6]}"
