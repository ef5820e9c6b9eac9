"""The files of a finished attribution: top.csv, groups.csv, query.png, report.html, sheet.png and manifest.json."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attrib_jax.attribution.groups import GroupShare, group_shares
from attrib_jax.core.settings import declared
from attrib_jax.core.types import Scores
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.protocol import named_groups
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.query import Query, read_region_mask
from attrib_jax.methods.base import Attribution, MethodConfig
from attrib_jax.methods.group_unlearn import read_group_shares
from attrib_jax.methods.patches import read_region_map
from attrib_jax.methods.unlearn import UnlearnConfig, UnlearningRecord, read_unlearning
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.report import Credit, Region, ReportData, Timing, write_contact_sheet, write_report
from attrib_jax.storage.files import write_bytes, write_json
from attrib_jax.storage.stages import load_stage

_LINEAR_EXPLANATION = (
    "The model was nudged to unlearn this image, and a training image's score is how fast its own loss begins to "
    "rise along that way, times the length of the way: the limit of the loss change for a small nudge. Images that "
    "the model needed for this query come first; unrelated ones stay near zero."
)
# With the rises of random training images and of the query.
_WENT_TOO_FAR = (
    "Unlearning went too far: the loss of random training images changed by {}, that of the query by {}: the model "
    "forgot more than this query, and the scores say little. Leave out step_size, or take a smaller one or a smaller "
    "loss_rise."
)


def write_outputs(
    result: Attribution,
    dataset: Dataset,
    query: Query,
    config: MethodConfig,
    *,
    model_name: str,
    model_credit: str | None = None,
    top_k: int = 24,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything but scores.npz into the query's folder, replacing what an earlier run wrote there.

    With several hosts all call it, and host 0 writes.

    Args:
      result: see `attribute_queries`.
      dataset, query, config: what it was made from.
      model_name: as it should read in the report.
      model_credit: licence line of the model, if it needs one.
      top_k: images shown, and rows of top.csv.
      record: further JSON values for manifest.json, such as the flags of the run.
    """
    run_on_host0(lambda: _write_outputs(result, dataset, query, config, model_name, model_credit, top_k, record or {}))


def _write_outputs(result, dataset, query, config, model_name, model_credit, top_k, record) -> None:
    folder = result.folder
    position = {int(row): index for index, row in enumerate(dataset.row_ids)}
    png = io.BytesIO()
    Image.fromarray(result.query.image).save(png, format="png")
    write_bytes(folder / "query.png", png.getvalue())
    write_bytes(folder / "top.csv", _top_csv(result.scores.top(top_k), dataset, position))

    unlearning = read_unlearning(folder) if isinstance(config, UnlearnConfig) else None
    shares = read_group_shares(folder) if config.method == "group-unlearn" else None
    report = report_data(
        result, dataset, query, config, model_name, model_credit, top_k, _regions(folder), unlearning, shares
    )
    if report.group_shares:
        write_bytes(folder / "groups.csv", _groups_csv(report.group_shares))
    else:
        (folder / "groups.csv").unlink(missing_ok=True)
    write_report(folder / "report.html", report)
    write_contact_sheet(folder / "sheet.png", report)

    stage = load_stage(folder.parent.parent, f"attribution/{result.name}")
    write_json(
        folder / "manifest.json",
        {
            "query": result.name,
            "settings": stage.settings,
            "fingerprints": stage.inputs,
            "versions": stage.versions,
            "created": stage.created,
            "timings_seconds": {name: seconds for name, (seconds, _) in result.timings.items()},
            "reused": [name for name, (_, reused) in result.timings.items() if reused],
            "query_loss": list(result.query_loss),
            **({} if unlearning is None else {"unlearning": unlearning.as_json()}),
            "notes": list(report.warnings),
            "scored": report.scored,
            "queries_together": result.num_queries,
            **record,
        },
    )


def report_data(
    result: Attribution,
    dataset: Dataset,
    query: Query,
    config: MethodConfig,
    model_name: str,
    model_credit: str | None = None,
    top_k: int = 24,
    regions: tuple[Region, ...] = (),
    unlearning: UnlearningRecord | None = None,
    shares: Sequence[GroupShare] | None = None,
) -> ReportData:
    """What the report of a query shows; arguments as of `write_outputs`. No file of the query is read.

    `regions` is the map that method `patches` keeps beside its scores, `unlearning` what `unlearn` keeps, and `shares`
    the part of each group where a method says it; if None it is made of the scores.
    """
    partial = config.partial
    linear = getattr(config, "score", None) == "linear"
    position = {int(row): index for index, row in enumerate(dataset.row_ids)}
    notes = list(result.query.notes)
    unreadable = 0 if partial else len(dataset) - len(result.scores)
    if unreadable:
        notes.append(f"{unreadable} of {len(dataset)} training images could not be read and have no score.")
    if unlearning is not None and unlearning.went_too_far:
        notes.append(_WENT_TOO_FAR.format(*_rises(unlearning)))
    groups = dataset.groups
    return ReportData(
        query_image=result.query.image,
        query_name=result.name,
        prompt=query.prompt,
        query_settings=_query_settings(query),
        method=config.method,
        method_settings=_method_settings(config, len(dataset)) | _how_far(unlearning),
        model_name=model_name,
        dataset_name=dataset.name,
        row_id=result.scores.row_id,
        score=result.scores.score,
        captions=lambda row: dataset.captions(position[row]),
        image=lambda row: _image(dataset, position[row]),
        group=None if groups is None else lambda row: int(groups[position[row]]),
        group_shares=_group_shares(result.scores, dataset, position) if shares is None else shares,
        groups_unlearned=shares is not None,
        flip=result.scores.flip,
        loss_before=result.scores.loss_before,
        loss_after=result.scores.loss_after,
        top_k=top_k,
        # The lowest finalists are not the least influential images.
        least_k=0 if partial else 6,
        num_images=len(dataset) if partial else None,
        explanation=_LINEAR_EXPLANATION if linear else None,
        timings={stage: Timing(seconds, reused) for stage, (seconds, reused) in result.timings.items()},
        region=getattr(config, "region", None),
        region_mask=_region_mask(config, result.query.image),
        regions=regions,
        warnings=tuple(notes),
        model_credit=None if model_credit is None else Credit(model_credit),
        dataset_credit=None if dataset.credit is None else Credit(dataset.credit, dataset.credit_url),
    )


def _region_mask(config: MethodConfig, image: np.ndarray) -> np.ndarray | None:
    mask = getattr(config, "region_mask", None)
    return None if mask is None else read_region_mask(mask, image.shape[:2])


def _regions(folder: Path) -> tuple[Region, ...]:
    """The map of regions that the method kept, if any."""
    stored = read_region_map(folder)
    if stored is None:
        return ()
    images = zip(*(stored[name].tolist() for name in ("row_id", "flip", "weight")))
    return tuple(Region(tuple(box), tuple(zip(*each))) for box, each in zip(stored["boxes"].tolist(), images))


def _image(dataset: Dataset, index: int) -> np.ndarray | None:
    """The image of a row; None for latents without images, or where its file has gone since it was encoded."""
    try:
        return dataset[index].image
    except (LookupError, UnreadableRowError):
        return None


def _top_csv(top: Scores, dataset: Dataset, position: Mapping[int, int]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    groups = named_groups(dataset)
    writer.writerow(["rank", "row_id", "score", "caption", *(["group"] if groups is not None else [])])
    for rank, (row, score) in enumerate(zip(top.row_id.tolist(), top.score.tolist()), start=1):
        group = [] if groups is None else [groups[position[row]]]
        writer.writerow([rank, row, repr(score), dataset.captions(position[row])[0], *group])
    return text.getvalue().encode()


def _group_shares(scores: Scores, dataset: Dataset, position: Mapping[int, int]) -> list[GroupShare]:
    """The part of each named group; empty where the data set has none."""
    names = named_groups(dataset)
    if names is None:
        return []
    return group_shares([names[position[row]] for row in scores.row_id.tolist()], scores.score)


def _groups_csv(shares: Sequence[GroupShare]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(GroupShare._fields)
    writer.writerows([each.group, each.images, *map(repr, each[2:])] for each in shares)
    return text.getvalue().encode()


def _how_far(record: UnlearningRecord | None) -> dict[str, str]:
    """What unlearning did to the query and to random training images, as the report shows it."""
    if record is None:
        return {}
    shown = {"step size (alpha)": ", ".join(f"{size:g}" for size in record.step_size[:3])}
    if len(record.step_size) > 3:
        shown["step size (alpha)"] += f", ... ({len(record.step_size)} steps)"
    if record.before is not None and record.after is not None:
        images, query = _rises(record)
        shown["rise of the query's loss"] = query
        shown[f"rise of the loss of {record.num_images} random training images"] = images
    return shown


def _rises(record: UnlearningRecord) -> list[str]:
    """Rises of the images' and of the query's mean loss, in words."""
    if record.before is None or record.after is None:
        return []
    pairs = zip(record.before, record.after)
    return [f"{after / before - 1:+.1%} ({before:.4f} to {after:.4f})" for before, after in pairs]


def _query_settings(query: Query) -> dict[str, str]:
    if query.latents is not None:
        return {"image": "given as latents"}
    if query.image is not None:
        name = "an array" if not isinstance(query.image, str | os.PathLike) else Path(query.image).name
        return {"image": f"given: {name}"}
    return {
        "seed": str(query.seed),
        "sampler": f"{query.sampler.upper()}, {query.sampler_steps} steps",
        "guidance": f"{query.guidance_scale:g}",
    }


def _method_settings(config: MethodConfig, size: int) -> dict[str, str]:
    """The settings that decide the scores, in the order of their declaration, as the report shows them."""
    shown = {}
    for name, field in declared(type(config)).items():
        value: Any = getattr(config, name)
        if name == "num_examples":
            value = value or size
        if name == "method" or field.setting.performance or not config.applies(name) or value in (None, (), False):
            continue
        if field.setting.path:
            # Where a file lies says nothing to a reader.
            value = tuple(Path(path).name for path in value) if field.many else Path(value).name
        text = (
            ", ".join(map(str, value))
            if isinstance(value, tuple)
            else f"{value:g}"
            if isinstance(value, float)
            else value
        )
        label = name.replace("_", " ")
        shown[f"{label} ({field.setting.symbol})" if field.setting.symbol else label] = (
            "yes" if value is True else f"{text} {field.setting.unit}" if field.setting.unit else str(text)
        )
    return shown
