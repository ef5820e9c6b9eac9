"""Leave-K-out: retrain without a method's top K images, and see whether the model still makes the query.

METHOD.md section 8. The higher the query's loss, and the farther its regeneration from the same noise (in latents, or
as a feature tower sees the two images), the more the images mattered. Random images are the reference: the number
of them whose removal does as much.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attrib_jax.convert.tower import Tower
from attrib_jax.core.settings import setting
from attrib_jax.core.types import ranking
from attrib_jax.evaluation.counterfactual import Counterfactuals
from attrib_jax.evaluation.metrics import RemovalCurve, crossed_mean, mean_and_error, over_sets
from attrib_jax.evaluation.named import QuerySet, SplitSettings, has_cascade, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.similarity import check_sees_images, image_directions
from attrib_jax.evaluation.tables import curve_plot, image_grid, write_table
from attrib_jax.jobs.query import decode
from attrib_jax.methods.base import MethodConfig

# Rows of the references; no method can have these names, see `read_methods`.
RANDOM = "random pictures"
WHOLE = "no pictures"
_NOTHING = np.array([], np.int64)
# What is measured -> the heads of its columns, in the table of all queries.
_DEVIATIONS = {"mse": "MSE", "similarity": "similarity"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveKOutConfig(SplitSettings):
    """What is removed, and what that is compared with."""

    remove: tuple[float, ...] = setting(
        (0.05,), "Numbers K of images that every method removes; below 1, shares of the data set.", above=0
    )
    curve: tuple[float, ...] = setting((), "Further numbers or shares, of random images, for the reference.", above=0)
    random_sets: int = setting(10, "Random sets of each number, the same for all queries.", low=1)
    train_seeds: tuple[int, ...] = setting(
        (0,), "Seeds of trainings, over which each query's change is averaged.", low=0, high=2**32 - 1
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("remove", "train_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}: expected at least one value, and each once. Change {name}.")
        for name in ("remove", "curve"):
            if any(value >= 1 and not value.is_integer() for value in getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}: expected whole numbers, or shares below 1. Change {name}."
                )

    def counts(self, size: int) -> tuple[int, ...]:
        """The Ks of a data set of `size` images; ValueError where one leaves none to train on."""
        return _counts("remove", self.remove, size)

    def all_counts(self, size: int) -> list[int]:
        """The Ks and the numbers of the reference curve, rising."""
        return sorted({*self.counts(size), *_counts("curve", self.curve, size)})


def _counts(name: str, values: Sequence[float], size: int) -> tuple[int, ...]:
    counts = [max(1, round(value * size)) if value < 1 else int(value) for value in values]
    if counts and max(counts) >= size:
        raise ValueError(
            f"{name} is {values}: expected fewer than the {size} images of the data set, so that some are left to "
            f"train on. Change {name}."
        )
    # A number and a share may be one.
    return tuple(dict.fromkeys(counts))


def top_positions(scores: np.ndarray, row_ids: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` highest of the scores (N,); equal ones by rising row id, as `Scores.top`."""
    return ranking(scores, row_ids)[:count]


def random_positions(size: int, count: int, number: int) -> np.ndarray:
    """Random set `number` of `count` positions.

    A larger count holds the smaller ones, and half of the positions are those that subset `number` of `half_subsets`
    goes without: the models of both protocols are the same.
    """
    return np.random.default_rng([0, number]).permutation(size)[size - count :]


class Effects:
    """What retraining without images does to each query, as means over the training seeds."""

    def __init__(self, counterfactuals: Counterfactuals, seeds: tuple[int, ...], tower: Tower | None = None):
        """`tower` is for `similarity`.

        Raises ValueError for a tower that sees no images, or where the regenerations' latents are not kept.
        """
        if tower is not None:
            check_sees_images(tower)
            if not counterfactuals.measure.pictures:
                raise ValueError(
                    "a tower is given, but the latents of the regenerated queries, which it would compare, are not "
                    "kept: give --pictures (MeasureConfig(pictures=True)) too. Models that were trained without it "
                    "are trained again."
                )
        self._counterfactuals, self._seeds, self._tower = counterfactuals, seeds, tower
        self._own_directions: np.ndarray | None = None

    def of(
        self, removed: list[np.ndarray], description: str, ahead: Sequence[np.ndarray] = ()
    ) -> dict[str, np.ndarray]:
        """For sets of positions (M): `dL` and `mse`, (M, Q).

        dL = L(query, retrained without) - L(query, trained with all), of one seed each; `mse` is that of the
        regeneration. Devices that would be idle train without sets of `ahead`, which come later.
        """
        full = [Training(_NOTHING, seed) for seed in self._seeds]
        # All at once, so that no device waits for the end of a list.
        trainings = [*full, *self._trainings(removed)]
        results = self._counterfactuals.results(trainings, description, self._trainings(ahead))
        split = {name: np.split(values, [len(full)]) for name, values in results.items()}
        changes = {
            "dL": [split["loss"][1].reshape(len(full), len(removed), -1), split["loss"][0][:, None]],
            "mse": [split["mse"][1].reshape(len(full), len(removed), -1), np.zeros(())],
        }
        return {name: np.mean(after - before, axis=0) for name, (after, before) in changes.items()}

    def similarity(self, removed: list[np.ndarray], queries: np.ndarray) -> np.ndarray:
        """Cosine similarity, in the tower, of queries' images and those that the retrained models draw instead.

        From the latents that are kept of the models: those of `of` are not trained again.

        Args:
          removed: M sets of positions.
          queries: (M, J), which queries each model is asked about.

        Returns:
          (M, J) float64, at most 1; the lower, the more the images mattered.
        """
        pipeline, tower = self._counterfactuals.run.pipeline, self._tower
        if self._own_directions is None:
            own = np.stack([query.latents for query in self._counterfactuals.prepared])
            self._own_directions = image_directions(pipeline, tower, own)
        asked = np.tile(queries, (len(self._seeds), 1))  # (seeds x M, J)
        latents = self._counterfactuals.results(self._trainings(removed))["latents"]
        drawn = latents[np.arange(len(asked))[:, None], asked]  # (seeds x M, J, h, w, c)
        directions = image_directions(pipeline, tower, drawn.reshape(-1, *drawn.shape[2:]))
        values = np.einsum("ad,ad->a", directions, self._own_directions[asked.ravel()])
        return values.reshape(len(self._seeds), *queries.shape).mean(axis=0)

    def _trainings(self, removed: Sequence[np.ndarray]) -> list[Training]:
        return [Training(positions, seed) for seed in self._seeds for positions in removed]


def run_leave_k_out(
    counterfactuals: Counterfactuals,
    methods: Mapping[str, MethodConfig],
    queries: QuerySet,
    config: LeaveKOutConfig,
    tower: Tower | None = None,
) -> tuple[list[dict], str]:
    """Removes every method's top K of each query of one split -> table rows and a markdown table.

    Tables `leave_k_out.csv` and `queries.csv` (one row for each query) and a plot for all K are kept in the workdir.
    With a `tower` they have the similarity, in it, of each query to its regeneration; see `Effects`.

    Raises ValueError for a tower that cannot be used, more images to remove than there are, or than a cascade ranks.
    """
    split = config.split
    run, positions = counterfactuals.run, queries.split(split)
    size, row_ids = len(run.data), run.data.row_ids
    counts, all_counts = config.counts(size), config.all_counts(size)
    for name, each in methods.items():
        if has_cascade(each) and each.num_finalists(size) < max(counts):
            raise ValueError(
                f"cascade is {each.cascade} for method {name!r}, which scores {each.num_finalists(size)} images in "
                f"full: expected at least the {max(counts)} to be removed. Raise cascade or cascade_min."
            )
    effects = Effects(counterfactuals, config.train_seeds, tower)
    scores = {name: method_scores(run, name, each, queries.of(split)) for name, each in methods.items()}

    sets = {
        count: [random_positions(size, count, number) for number in range(config.random_sets)] for count in all_counts
    }
    # Of all methods and Ks, in the order in which they are asked for.
    tops = {
        (count, name): [top_positions(query, row_ids, count) for query in each]
        for count in counts
        for name, each in scores.items()
    }
    ahead = [positions for each in tops.values() for positions in each]
    trainings = [_NOTHING, *(each for count in all_counts for each in sets[count])]
    random = effects.of(trainings, "train without random images", ahead)
    whole = {name: each[0, positions] for name, each in random.items()}
    random = {name: each[1:] for name, each in random.items()}
    # (counts, sets, Q of the split)
    random = {
        name: each[:, positions].reshape(len(all_counts), config.random_sets, -1) for name, each in random.items()
    }
    curve = RemovalCurve.fit(all_counts, random["dL"].mean(axis=(1, 2)), np.full(len(all_counts), config.random_sets))

    if tower is not None:
        whole["similarity"] = effects.similarity([_NOTHING], positions[None])[0]
    # What the models trained on all do: of a seed that is not the query's own model's, they draw something else.
    rows, per_query, points = [_row(WHOLE, 0, whole, None, curve)], [], {name: [] for name in scores}
    for count in counts:
        base = {kind: each[all_counts.index(count)] for kind, each in random.items()}
        if tower is not None:
            asked = np.tile(positions, (config.random_sets, 1))
            base["similarity"] = effects.similarity(sets[count], asked)
        rows.append(_row(RANDOM, count, base, None, curve))
        for name in scores:
            removed = tops[count, name]
            found = effects.of(removed, f"train without the top {count} of {name}", ahead)
            # Each query under the model that lacks its own images.
            own = {kind: values[np.arange(len(positions)), positions] for kind, values in found.items()}
            if tower is not None:
                own["similarity"] = effects.similarity(removed, positions[:, None])[:, 0]
            rows.append(_row(name, count, own, base["dL"], curve))
            points[name].append((count, rows[-1]["dL"], rows[-1]["dL error"]))
            compared = ["dL"] + ["similarity"] * (tower is not None)
            per_query += [
                {
                    "method": name,
                    "K": count,
                    "query": queries.queries[query].prompt,
                    "seed": queries.queries[query].seed,
                }
                | {kind: float(values[place]) for kind, values in own.items()}
                | {f"random {kind}": float(base[kind][:, place].mean()) for kind in compared}
                for place, query in enumerate(positions)
            ]
            _write(run, split, rows, per_query, finished=False)
    folder = _write(run, split, rows, per_query)
    title = f"{len(positions)} {split} queries, {len(config.train_seeds)} training seed(s), {size} training pictures"
    curve_plot(folder / "leave_k_out.png", title, curve, points)
    if counterfactuals.measure.pictures:
        own = {name: tops[counts[0], name] for name in scores}
        _write_images(folder / "pictures.png", counterfactuals, own, positions, counts[0], config.train_seeds[0])
    return rows, f"{title}\n\n{(folder / 'leave_k_out.md').read_text(encoding='utf-8')}"


def _row(
    name: str, count: int, own: Mapping[str, np.ndarray], random: np.ndarray | None, curve: RemovalCurve
) -> dict[str, Any]:
    """Of what was measured for each query (Q,), or under each random set (S, Q); `random` is the dL of the sets."""
    estimates = {kind: (mean_and_error if values.ndim == 1 else crossed_mean)(values) for kind, values in own.items()}
    change = estimates["dL"]
    row = {"method": name, "K": count, "dL": change.mean, "dL error": change.error}
    if random is None:
        row |= {"over random": float("nan"), "in errors": float("nan")}
    else:
        difference = over_sets(own["dL"], random)
        row |= {"over random": difference.mean, "in errors": difference.in_errors}
    row["as random pictures"] = float(count) if random is None else curve.equivalent(change.mean)
    for kind, head in _DEVIATIONS.items():
        if kind in estimates:
            row |= {head: estimates[kind].mean, f"{head} error": estimates[kind].error}
    return row


def _write(run, split: str, rows: list[dict], per_query: list[dict], finished: bool = True):
    folder = run.root.workdir / "evaluation" / f"leave-k-out-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(rows, key=lambda row: (row["K"], -row["dL"]))
    write_table(folder, "leave_k_out", order, finished)
    if per_query:
        write_table(folder, "queries", per_query, finished)
    return folder


def _write_images(
    file,
    counterfactuals: Counterfactuals,
    tops: Mapping[str, list[np.ndarray]],
    positions: np.ndarray,
    count: int,
    seed: int,
):
    """A row for each query: itself, as the model retrained on all draws it, and as those without images do."""
    run = counterfactuals.run
    removed = {"trained on all": [_NOTHING] * len(positions), **tops}
    removed[RANDOM] = [random_positions(len(run.data), count, 0)] * len(positions)
    columns = {"query": np.stack([counterfactuals.prepared[place].image for place in positions])}
    for name, sets in removed.items():
        found = counterfactuals.results([Training(positions, seed) for positions in sets])["latents"]
        own = found[np.arange(len(positions)), positions].astype(np.float32)
        columns[name] = decode(run.pipeline, own)
    image_grid(file, f"{count} images removed", [counterfactuals.queries[p].prompt for p in positions], columns)
