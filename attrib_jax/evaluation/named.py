"""The methods and queries of a study: read from files, and their scores over the whole data set, computed once."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribute import Attributor
from attrib_jax.core.checks import check_choice
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.jobs.identity import check_query_name, query_settings
from attrib_jax.jobs.query import Query
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.feature_settings import FeatureSettings
from attrib_jax.methods.gradient_settings import GradientSettings
from attrib_jax.storage.files import stored_arrays, write_arrays

_SHARED = "shared"
_FILE = "scores.safetensors"
SPLITS = ("tuning", "reported")


def read_methods(file: str | os.PathLike, only: Sequence[str] = ()) -> dict[str, AttributeConfig]:
    """Method name -> its settings, from a JSON object of objects.

    Each holds fields of `AttributeConfig` that differ from the defaults; those of the object `shared` go to all.

    Args:
      file: such as `configs/evaluation/methods_digits.json`.
      only: names to take, in this order; all if empty.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such object, a field is unknown, or a name of `only` is; says which.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"methods file {file} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise ValueError(f'methods file {file} is no object of objects; expected {{"unlearn": {{"step_size": 0.1}}}}')
    shared = content.pop(_SHARED, {})
    if not content:
        raise ValueError(f"methods file {file} names no method")
    fields = [field.name for field in dataclasses.fields(AttributeConfig)]
    configs = {}
    for name, values in content.items():
        check_query_name(name)
        for field in {**shared, **values}:
            check_choice(f"field of method {name!r}", field, fields)
        if only and name not in only:
            continue
        try:
            configs[name] = _config({**shared, **values})
        except (ValueError, TypeError) as error:
            raise ValueError(f"method {name!r} of {file}: {error}") from error
    for name in only:
        check_choice("method", name, content)
    return {name: configs[name] for name in only or configs}


def _config(values: dict[str, Any]) -> AttributeConfig:
    """A config from JSON values: lists are tuples there, and objects the nested records."""
    nested = {"gradients": GradientSettings, "features": FeatureSettings}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return AttributeConfig(**{name: nested[name](**v) if name in nested else v for name, v in values.items()})


@dataclasses.dataclass(frozen=True)
class QuerySet:
    """The queries of a study.

    Attributes:
      queries: of both splits, the tuning ones first; what is measured is measured of all.
      num_tuning: how many are for choosing settings, never reported.
    """

    queries: tuple[Query, ...]
    num_tuning: int

    def split(self, name: str) -> np.ndarray:
        """The positions of one split's queries; ValueError where it has none."""
        check_choice("split", name, SPLITS)
        positions = np.arange(len(self.queries))
        positions = positions[: self.num_tuning] if name == "tuning" else positions[self.num_tuning :]
        if not len(positions):
            raise ValueError(f"split is {name!r}, but there are no {name} queries; give --{name}_queries")
        return positions

    def of(self, name: str) -> list[Query]:
        """The queries of one split."""
        return [self.queries[position] for position in self.split(name)]


def method_scores(attributor: Attributor, name: str, config: AttributeConfig, queries: Sequence[Query]) -> np.ndarray:
    """The scores (Q, N) float32 of one method, larger is more influential; columns as `attributor.data`.

    Kept in one small file, so that a study goes on where the attributions themselves are not at hand.
    """
    settings = {"method": config.settings(), "queries": [query_settings(query) for query in queries]}
    digest = json_digest(settings)[:8]
    with attributor.root.stage(f"evaluation/scores/{name}-{digest}", settings, attributor.inputs_of(config)) as stage:
        file = stage.path / _FILE
        stored = stored_arrays(file)
        if stored is not None:
            return stored["scores"]
        names = [f"{name}-{digest}-{index}" for index in range(len(queries))]
        rows = attributor.data.row_ids
        results = attributor.attribute_many(queries, config, names)
        scores = np.stack([_in_order(result.scores, rows) for result in results]).astype(np.float32)
        write_arrays(file, {"scores": scores}, {"method": name})
        return scores


def _in_order(scores: Any, rows: np.ndarray) -> np.ndarray:
    """Scores by the rows of the data set; a cascade's also-rans are below all of its finalists."""
    found = dict(zip(scores.row_id.tolist(), scores.score.tolist()))
    lowest = float(np.min(scores.score)) - 1.0
    return np.array([found.get(row, lowest) for row in rows.tolist()])
