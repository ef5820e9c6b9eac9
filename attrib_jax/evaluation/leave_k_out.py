"""Leave-K-out: retrain without a method's top K images, and see whether the model still makes the query.

METHOD.md section 8. The higher the query's loss, and the farther its regeneration from the same noise (in latents, or
as a feature tower sees the two images), the more the images mattered. Random images are the reference: the number
of them whose removal does as much. With `queries_per_model` several queries share the model that lacks the union of
their images, and queries of other prompts are the controls, which a good method leaves alone (METHOD.md section 11).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.convert.tower import Tower
from attrib_jax.core.settings import setting
from attrib_jax.core.types import ranking
from attrib_jax.evaluation.counterfactual import Counterfactuals
from attrib_jax.evaluation.metrics import Estimate, RemovalCurve, crossed_mean, mean_and_error, over_sets
from attrib_jax.evaluation.named import (
    DEFAULT,
    QuerySet,
    RetrainedSettings,
    StoredScores,
    check_each_once,
    has_cascade,
    method_scores,
)
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.similarity import check_sees_images, image_directions
from attrib_jax.evaluation.tables import curve_plot, image_grid, write_table
from attrib_jax.jobs.query import decode
from attrib_jax.methods.base import MethodConfig

# Rows of the references; no method can have these names, see `read_methods`.
RANDOM = "random images"
WHOLE = "no images"
_NOTHING = np.array([], np.int64)
# What is measured of the regenerated query.
_DEVIATIONS = ("mse", "similarity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveKOutConfig(RetrainedSettings):
    """What is removed, and what that is compared with."""

    remove: tuple[float, ...] = setting(
        (0.05,), "Numbers K of images that every method removes for a query; below 1, shares of the data set.", above=0
    )
    curve: tuple[float, ...] = setting((), "Further numbers or shares, of random images, for the reference.", above=0)
    random_sets: int = setting(10, "Random sets of each number, the same for all queries.", low=1)
    queries_per_model: int = setting(
        1,
        "Queries whose top images are removed together, so that one model serves them all; as many others, with other "
        "prompts, are its controls.",
        low=1,
    )

    def __post_init__(self):
        super().__post_init__()
        check_each_once("remove", self.remove)
        if len(set(self.curve)) < len(self.curve):
            check_each_once("curve", self.curve)
        for name in ("remove", "curve"):
            if any(value >= 1 and not value.is_integer() for value in getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}: expected whole numbers, or shares below 1. Change {name}."
                )

    def counts(self, size: int) -> tuple[int, ...]:
        """The Ks of a data set of `size` images; ValueError where one leaves none to train on."""
        return _counts("remove", self.remove, size)

    def random_counts(self, size: int) -> dict[int, int]:
        """K -> the number of images of a random set to compare with: as many as a model goes without.

        Raises ValueError where that leaves none to train on.
        """
        counts = {count: count * self.queries_per_model for count in self.counts(size)}
        largest = max(counts)
        if counts[largest] >= size:
            raise ValueError(
                f"queries_per_model is {self.queries_per_model}, so that up to {counts[largest]} images are removed "
                f"together at K = {largest}: expected fewer than the {size} of the data set. Lower remove or "
                "queries_per_model."
            )
        return counts

    def all_counts(self, size: int) -> list[int]:
        """The sizes of random sets, those of the reference curve among them, rising."""
        return sorted({*self.random_counts(size).values(), *_counts("curve", self.curve, size)})

    def groups(self, queries: QuerySet) -> "Groups":
        """The queries of the split that share models, and each group's controls.

        Raises ValueError where they cannot be divided, or a group has no controls.
        """
        positions, size = queries.split(self.split), self.queries_per_model
        if len(positions) % size:
            raise ValueError(
                f"queries_per_model is {size}: expected a divisor of the {len(positions)} {self.split} queries, so "
                "that every model is of as many. Change queries_per_model."
            )
        targets = positions.reshape(-1, size)
        controls = []
        for place, group in enumerate(targets):
            prompts = {queries.queries[position].prompt for position in group}
            others = np.roll(positions, -(place + 1) * size)[: len(positions) - size]
            controls.append([other for other in others if queries.queries[other].prompt not in prompts][:size])
        count = min(map(len, controls))
        if not count and size > 1:
            raise ValueError(
                f"queries_per_model is {size}: expected {self.split} queries whose prompts none of a model's queries "
                "has, as its controls. Lower queries_per_model, or give more queries."
            )
        return Groups(targets, np.array([each[:count] for each in controls], np.int64).reshape(len(targets), count))


class Groups(NamedTuple):
    """Queries that share a model, by their positions.

    Attributes:
      targets: (G, g), each query of the split once.
      controls: (G, c), for each group queries whose prompts none of its targets has.
    """

    targets: np.ndarray
    controls: np.ndarray


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
        """For sets of positions (M): `dl` and `mse`, (M, Q).

        dL = L(query, retrained without) - L(query, trained with all), of one seed each; `mse` is that of the
        regeneration. Devices that would be idle train without sets of `ahead`, which come later.
        """
        full = [Training(_NOTHING, seed) for seed in self._seeds]
        # All at once, so that no device waits for the end of a list.
        trainings = [*full, *self._trainings(removed)]
        results = self._counterfactuals.results(trainings, description, self._trainings(ahead))
        split = {name: np.split(values, [len(full)]) for name, values in results.items()}
        changes = {
            "dl": [split["loss"][1].reshape(len(full), len(removed), -1), split["loss"][0][:, None]],
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
    methods: Mapping[str, MethodConfig | StoredScores],
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
    run, (targets, controls) = counterfactuals.run, config.groups(queries)
    positions, number = targets.ravel(), np.arange(len(targets))[:, None]
    size, row_ids = len(run.data), run.data.row_ids
    counts, random_counts, all_counts = config.counts(size), config.random_counts(size), config.all_counts(size)
    for name, each in methods.items():
        if has_cascade(each) and each.num_finalists(size) < max(counts):
            raise ValueError(
                f"cascade is {each.cascade} for method {name!r}, which scores {each.num_finalists(size)} images in "
                f"full: expected at least the {max(counts)} to be removed. Raise cascade or cascade_min."
            )
    effects = Effects(counterfactuals, config.train_seeds, tower)
    scores = {name: method_scores(run, name, each, queries, split) for name, each in methods.items()}

    sets = {count: [random_positions(size, count, each) for each in range(config.random_sets)] for count in all_counts}
    # Of all methods and Ks, in the order in which they are asked for: what each model goes without.
    tops = {
        (count, name): [
            np.unique(np.concatenate([top_positions(query, row_ids, count) for query in group]))
            for group in each.reshape(*targets.shape, size)
        ]
        for count in counts
        for name, each in scores.items()
    }
    ahead = [removed for each in tops.values() for removed in each]
    trainings = [_NOTHING, *(each for count in all_counts for each in sets[count])]
    random = effects.of(trainings, "train without random images", ahead)
    whole = {kind: each[0, positions] for kind, each in random.items()}
    # (counts, sets, Q of the split)
    random = {
        kind: each[1:, positions].reshape(len(all_counts), config.random_sets, -1) for kind, each in random.items()
    }
    curve = RemovalCurve.fit(all_counts, random["dl"].mean(axis=(1, 2)), np.full(len(all_counts), config.random_sets))

    if tower is not None:
        whole["similarity"] = effects.similarity([_NOTHING], positions[None])[0]
    # What the models trained on all do: of a seed that is not the query's own model's, they draw something else.
    rows, per_query, points = [_row(WHOLE, 0, 0, whole, curve)], [], {name: [] for name in scores}
    for count in counts:
        together = random_counts[count]
        base = {kind: each[all_counts.index(together)] for kind, each in random.items()}
        if tower is not None:
            asked = np.tile(positions, (config.random_sets, 1))
            base["similarity"] = effects.similarity(sets[together], asked)
        rows.append(_row(RANDOM, count, together, base, curve))
        effect_of: dict[str, np.ndarray] = {}
        for name in scores:
            removed = tops[count, name]
            found = effects.of(removed, f"train without the top {count} of {name}", ahead)
            # Each query under the model that lacks its own images; the controls under models that lack others'.
            own = {kind: values[number, targets] for kind, values in found.items()}
            if tower is not None:
                own["similarity"] = effects.similarity(removed, targets)
            mean_removed = float(np.mean([len(each) for each in removed]))
            rows.append(_row(name, count, mean_removed, own, curve, base["dl"], found["dl"][number, controls]))
            points[name].append((mean_removed, rows[-1]["dl"], rows[-1]["error"]))
            effect_of[name] = own["dl"].mean(axis=1)
            compared = ["dl"] + ["similarity"] * (tower is not None)
            per_query += [
                {
                    "method": name,
                    "K": count,
                    "query": queries.queries[query].prompt,
                    "seed": queries.queries[query].seed,
                }
                | {kind: float(values.ravel()[place]) for kind, values in own.items()}
                | {f"random {kind}": float(base[kind][:, place].mean()) for kind in compared}
                for place, query in enumerate(positions)
            ]
            _write(run, split, rows, per_query, finished=False)
        for row in rows:
            if row["K"] == count and row["method"] in effect_of:
                row |= _difference(row["method"], effect_of)
    folder = _write(run, split, rows, per_query)
    title = f"{len(positions)} {split} queries, {len(config.train_seeds)} training seed(s), {size} training images"
    if config.queries_per_model > 1:
        title += f"; {config.queries_per_model} queries a model, {controls.shape[1]} controls"
    curve_plot(folder / "leave_k_out.png", title, curve, points)
    if counterfactuals.measure.pictures:
        own = {name: [each for each in tops[counts[0], name] for _ in range(targets.shape[1])] for name in scores}
        _write_images(
            folder / "pictures.png", counterfactuals, own, positions, random_counts[counts[0]], config.train_seeds[0]
        )
    return rows, f"{title}\n\n{(folder / 'leave_k_out.md').read_text(encoding='utf-8')}"


def _row(
    name: str,
    count: int,
    removed: float,
    own: Mapping[str, np.ndarray],
    curve: RemovalCurve,
    random: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of the table.

    Args:
      name, count: of the method and its K.
      removed: how many images a model goes without, the mean over models.
      own: what was measured of each query, (Q,) of the model trained on all, (S, Q) under each random set, or (G, g) in
        groups that share a model.
      curve: the effect of removing random images.
      random: (S, Q) dl under each random set of as many images; for a method.
      controls: (G, c) dl of each group's controls; for a method.
    """
    estimates = {}
    for kind, values in own.items():
        if random is not None:
            # What a model does to its queries is one event: groups are the samples, each of as many queries.
            estimates[kind] = mean_and_error(values.mean(axis=1))
        else:
            estimates[kind] = mean_and_error(values) if values.ndim == 1 else crossed_mean(values)
    change = estimates["dl"]
    row = {"method": name, "K": count, "removed": removed, "dl": change.mean, "error": change.error}
    over = Estimate(np.nan, np.nan)
    if random is not None:
        over = over_sets(own["dl"].mean(axis=1), random.reshape(len(random), *own["dl"].shape).mean(axis=2))
    control = Estimate(np.nan, np.nan)
    if controls is not None and controls.shape[1]:
        control = mean_and_error(controls.mean(axis=1))
    row |= {
        "over_random": over.mean,
        "over_random_errors": over.in_errors,
        "as_random_images": removed if random is None else curve.equivalent(change.mean),
        "control": control.mean,
        "control_error": control.error,
        "difference": np.nan,
        "difference_error": np.nan,
    }
    for kind in _DEVIATIONS:
        if kind in estimates:
            row |= {kind: estimates[kind].mean, f"{kind}_error": estimates[kind].error}
    return row


def _difference(name: str, effect_of: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The paired difference of a method to `default` in dl, over groups of queries (G,); NaN where there is none."""
    if name == DEFAULT or DEFAULT not in effect_of:
        return {"difference": np.nan, "difference_error": np.nan}
    difference = mean_and_error(effect_of[name] - effect_of[DEFAULT])
    return {"difference": difference.mean, "difference_error": difference.error}


def _write(run, split: str, rows: list[dict], per_query: list[dict], finished: bool = True):
    folder = run.root.workdir / "evaluation" / f"leave-k-out-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(rows, key=lambda row: (row["K"], -row["dl"]))
    write_table(folder, "leave_k_out", order, finished)
    if finished:
        write_table(run.root.workdir, "leave_k_out", order)
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
