"""Querying with training images: an image that the model was trained on should come out on top itself."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from attrib_jax.core.settings import setting
from attrib_jax.evaluation.metrics import ranks, recall_at
from attrib_jax.evaluation.named import SplitSettings, keep_scores
from attrib_jax.evaluation.tables import write_table
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods.base import MethodConfig

_ORDER_SEED = 2024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConfig(SplitSettings):
    """Which training images are the queries: the first ones of a fixed random order, or for tuning the last."""

    self_queries: int = setting(50, "Training images that are queries.", low=1)

    def positions(self, size: int) -> np.ndarray:
        """Their positions among `size` images; ValueError where the two splits would overlap."""
        if 2 * self.self_queries > size:
            raise ValueError(
                f"self_queries is {self.self_queries}: expected at most half of the {size} training images. Change "
                "self_queries."
            )
        order = np.random.default_rng(_ORDER_SEED).permutation(size)
        return order[: self.self_queries] if self.split == "reported" else order[-self.self_queries :]


def run_self(run: Run, methods: Mapping[str, MethodConfig], config: SelfConfig) -> str:
    """Ranks of each query itself, and of the best of its near-duplicates, by every method -> a markdown table.

    Queries have their image's latents as is and its first caption. Kept in the workdir as `self.csv`, see
    `write_table`.
    """
    data, dataset = run.data, run.dataset
    positions = config.positions(len(data))
    # A data set may hold rows that could not be encoded: its positions are not those of `data`.
    place_in_dataset = {row: place for place, row in enumerate(dataset.row_ids.tolist())}
    places = np.array([place_in_dataset[row] for row in data.row_ids.tolist()])
    queries = []
    for place in positions.tolist():
        latents, text = data.inputs(place, 0, 0)
        caption = dataset.captions(int(places[place]))[0]
        # Of latents without images nobody knows the captions, which are empty then, but their text states are there.
        given = {} if caption else {"text": jax.tree.map(lambda leaf: leaf[0], text)}
        queries.append(Query(caption, latents=np.asarray(latents[0]), **given))
    groups = None if dataset.groups is None else np.asarray(dataset.groups)[places]
    rows = []
    for name, method in methods.items():
        rows.append(
            {"method": name}
            | summary(keep_scores(run, f"self-{config.split}/{name}", method, queries), positions, groups)
        )
        folder = run.root.workdir / "evaluation" / f"self-{config.split}"
        folder.mkdir(parents=True, exist_ok=True)
        table = write_table(folder, "self", rows, finished=len(rows) == len(methods))
    return f"{len(queries)} {config.split} training images as queries, among {len(data)}\n\n{table}"


def summary(scores: np.ndarray, positions: np.ndarray, groups: np.ndarray | None) -> dict[str, float]:
    """Median rank and recall@1, @10 of each query's own image, and of the best one of its group.

    Args:
      scores: (Q, N).
      positions: (Q,) of the queries among the N.
      groups: (N,) near-duplicate groups; None for none.
    """
    ranked = ranks(scores)
    own = ranked[np.arange(len(positions)), positions]
    kinds = {"own": own}
    if groups is not None:
        kinds["group"] = np.array([row[groups == groups[place]].min() for row, place in zip(ranked, positions)])
    return {
        f"{label} ({kind})": value
        for kind, values in kinds.items()
        for label, value in (
            ("median rank", float(np.median(values))),
            ("recall@1", recall_at(values, 1)),
            ("recall@10", recall_at(values, 10)),
        )
    }
