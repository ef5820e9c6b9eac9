"""The files of a finished attribution: top.csv, query.png, report.html, sheet.png and manifest.json."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attrib_jax.attribute import Attributed
from attrib_jax.core.types import Scores
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.query import Query
from attrib_jax.jobs.regions import read_region_mask
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.feature_settings import SIMILARITIES, TOWER_METHODS
from attrib_jax.methods.gradient_settings import PROJECTED_METHODS
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.report import Credit, ReportData, Timing, write_contact_sheet, write_report
from attrib_jax.storage.files import write_bytes, write_json
from attrib_jax.storage.stages import load_stage

# Methods that take gradients of the model's own loss, whose settings are those of `AttributeConfig`.
_GRADIENT_METHODS = ("unlearn", "influence")

_LINEAR_EXPLANATION = (
    "The model was nudged to unlearn this picture, and a training picture's score is how fast its own loss begins to "
    "rise along that way, times the length of the way: the limit of the loss change for a small nudge. Pictures that "
    "the model needed for this query come first; unrelated ones stay near zero."
)


def write_outputs(
    result: Attributed,
    dataset: Dataset,
    query: Query,
    config: AttributeConfig,
    *,
    model_name: str,
    model_credit: str | None = None,
    top_k: int = 24,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything but scores.npz into the query's folder, replacing what an earlier run wrote there.

    With several hosts all call it, and host 0 writes.

    Args:
      result: see `Attributor.attribute`.
      dataset, query, config: what it was made from.
      model_name: as it should read in the report.
      model_credit: licence line of the model, if it needs one.
      top_k: pictures shown, and rows of top.csv.
      record: further JSON values for manifest.json, such as the flags of the run.
    """
    run_on_host0(lambda: _write_outputs(result, dataset, query, config, model_name, model_credit, top_k, record or {}))


def _write_outputs(result, dataset, query, config, model_name, model_credit, top_k, record) -> None:
    folder = result.folder
    cascade = bool(config.method in _GRADIENT_METHODS and config.cascade)
    linear = config.method == "unlearn" and config.score == "linear"
    position = {int(row): index for index, row in enumerate(dataset.row_ids)}
    png = io.BytesIO()
    Image.fromarray(result.query.image).save(png, format="png")
    write_bytes(folder / "query.png", png.getvalue())
    write_bytes(folder / "top.csv", _top_csv(result.scores.top(top_k), dataset, position))

    notes = list(result.query.notes)
    unreadable = 0 if cascade else len(dataset) - len(result.scores)
    if unreadable:
        notes.append(f"{unreadable} of {len(dataset)} training pictures could not be read and have no score.")
    groups = dataset.groups
    report = ReportData(
        query_image=result.query.image,
        query_name=result.name,
        prompt=query.prompt,
        query_settings=_query_settings(query),
        method=config.method,
        method_settings=_method_settings(config, len(dataset)),
        model_name=model_name,
        dataset_name=dataset.name,
        row_id=result.scores.row_id,
        score=result.scores.score,
        captions=lambda row: dataset.captions(position[row]),
        image=lambda row: _picture(dataset, position[row]),
        group=None if groups is None else lambda row: int(groups[position[row]]),
        flip=result.scores.flip,
        loss_before=result.scores.loss_before,
        loss_after=result.scores.loss_after,
        top_k=top_k,
        # The lowest finalists are not the least influential pictures.
        least_k=0 if cascade else 6,
        num_pictures=len(dataset) if cascade else None,
        explanation=_LINEAR_EXPLANATION if linear else None,
        timings={stage: Timing(seconds, reused) for stage, (seconds, reused) in result.timings.items()},
        region=config.region,
        region_mask=_region_mask(config, result.query.image),
        warnings=tuple(notes),
        model_credit=None if model_credit is None else Credit(model_credit),
        dataset_credit=None if dataset.credit is None else Credit(dataset.credit, dataset.credit_url),
    )
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
            "notes": notes,
            "scored": report.scored,
            "queries_together": result.together,
            **record,
        },
    )


def _region_mask(config: AttributeConfig, image: np.ndarray) -> np.ndarray | None:
    return None if config.region_mask is None else read_region_mask(config.region_mask, image.shape[:2])


def _picture(dataset: Dataset, index: int) -> np.ndarray | None:
    """The picture of a row; None for latents without pictures, or where its file has gone since it was encoded."""
    try:
        return dataset[index].image
    except (LookupError, UnreadableRowError):
        return None


def _top_csv(top: Scores, dataset: Dataset, position: Mapping[int, int]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "row_id", "score", "caption"])
    for rank, (row, score) in enumerate(zip(top.row_id.tolist(), top.score.tolist()), start=1):
        writer.writerow([rank, row, repr(score), dataset.captions(position[row])[0]])
    return text.getvalue().encode()


def _query_settings(query: Query) -> dict[str, str]:
    if query.latents is not None:
        return {"picture": "given as latents"}
    if query.image is not None:
        name = "an array" if not isinstance(query.image, str | os.PathLike) else Path(query.image).name
        return {"picture": f"given: {name}"}
    return {
        "seed": str(query.seed),
        "sampler": f"{query.sampler.upper()}, {query.sampler_steps} steps",
        "guidance": f"{query.guidance_scale:g}",
    }


def _similarity_settings(config: AttributeConfig) -> dict[str, str]:
    method = TOWER_METHODS.get(config.method)
    settings = {} if method is None else {"tower": Path(config.features.tower).name}
    if method is not None and method.mapped:
        settings["mapping"] = Path(config.features.head).name
    if method is not None and method.text:
        return settings | {"captions": config.captions}
    return settings | {"flips": config.flips}


def _projected_settings(config: AttributeConfig) -> dict[str, str]:
    gradients = config.gradients
    settings = {
        "weights": config.weights,
        "projection": f"{gradients.projection}, {gradients.projection_dim} numbers, seed {gradients.projection_seed}",
        "regularisation": f"{gradients.regularisation:g} x mean eigenvalue",
        "query draws": str(config.query_draws),
        "timesteps": f"every {config.stride}",
        "captions": config.captions,
        "flips": config.flips,
        "loss seed": str(config.loss_seed),
    }
    if config.precision != "float32":
        settings["precision"] = config.precision
    if config.method == "journey-trak":
        settings["query's timestep"] = str(gradients.journey_timestep)
    if config.method == "das" and gradients.das_leverage:
        settings["leverage"] = "divided by 1 - h"
    if gradients.ensemble:
        settings["models"] = str(1 + len(gradients.ensemble))
    return settings


def _method_settings(config: AttributeConfig, size: int) -> dict[str, str]:
    if config.method in SIMILARITIES:
        return _similarity_settings(config)
    if config.method in PROJECTED_METHODS:
        return _projected_settings(config)
    if config.method not in _GRADIENT_METHODS:
        return {}
    curvature = {"diagonal": "diagonal Fisher", "ekfac": "EKFAC"}[config.curvature]
    settings = {"weights": config.weights}
    if config.method == "unlearn":
        settings |= {
            "update": f"Newton, {curvature}" if config.update == "newton" else "gradient ascent",
            "step size": f"{config.step_size:g}",
            "steps": str(config.steps),
        }
        if config.keep_ewc_gradient:
            settings["EWC gradient"] = "kept"
    else:
        settings["curvature"] = curvature
    settings |= {
        "query draws": str(config.query_draws),
        "timesteps": f"every {config.stride}",
        "captions": config.captions,
        "flips": config.flips,
        "loss seed": str(config.loss_seed),
    }
    if config.method == "unlearn" and config.score == "linear":
        settings["score"] = "linearised"
    if config.precision != "float32":
        settings["precision"] = config.precision
    if config.cascade:
        settings["cascade"] = (
            f"all at every {config.cascade_stride} timesteps, then the best {config.cascade:g} of them, and at least "
            f"{config.cascade_min:,}"
        )
    if config.update == "newton":
        fitted = {"Fisher samples": str(config.fisher_samples)}
        settings |= fitted if config.fisher is None else {"Fisher": Path(config.fisher).name}
        settings["damping"] = f"{config.damping:g}"
        if config.curvature == "ekfac":
            settings["EKFAC damping"] = f"{config.ekfac_damping:g} of each layer's mean eigenvalue"
        if config.method == "unlearn":
            settings["N"] = str(config.num_examples or size)
    if config.region is not None:
        settings["region"] = ", ".join(map(str, config.region))
    if config.region_mask is not None:
        settings["region mask"] = Path(config.region_mask).name
    return settings
