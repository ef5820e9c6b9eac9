"""The linear datamodeling score: do summed scores predict the losses of models trained on half of the data?"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from attrib_jax.core.settings import setting
from attrib_jax.evaluation.counterfactual import Counterfactuals
from attrib_jax.evaluation.metrics import Estimate, Lds, half_subsets, lds, noise_ceiling
from attrib_jax.evaluation.named import DEFAULT, QuerySet, RetrainedSettings, StoredScores, has_cascade, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.tables import bar_plot, write_table
from attrib_jax.methods.base import MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LdsConfig(RetrainedSettings):
    """Which models are trained: of every training seed one on each random subset."""

    lds_models: int = setting(64, "Number of random subsets, and of models.", low=3)
    lds_share: float = setting(0.5, "Share of the data set that a model is trained on.", low=0, high=1)
    lds_seed: int = setting(0, "Seed of the subsets.", low=0, high=2**32 - 1)

    def subsets(self, size: int) -> tuple[np.ndarray, list[Training]]:
        """(M, N) bool, the images that each subset keeps, and the trainings on them, (S, M) in one list.

        Raises ValueError where the share leaves none of the images, or all.
        """
        count = round(self.lds_share * size)
        if not 0 < count < size:
            raise ValueError(
                f"lds_share is {self.lds_share}, {count} of {size} images: expected some and not all. Change lds_share."
            )
        kept = half_subsets(size, self.lds_models, self.lds_share, self.lds_seed)
        return kept, [Training(np.flatnonzero(~row), seed) for seed in self.train_seeds for row in kept]


def run_lds(
    counterfactuals: Counterfactuals,
    methods: Mapping[str, MethodConfig | StoredScores],
    queries: QuerySet,
    config: LdsConfig,
) -> tuple[dict[str, Lds], str]:
    """The linear datamodeling score of each method on the queries of one split -> results and a markdown table.

    Tables `lds.csv` (one row for each method, the best first; `difference` is to the method `default`) and
    `lds_queries.csv`, and a plot, are kept in the workdir.

    Raises ValueError for a method with a cascade, which has no scores of most images to sum.
    """
    for name, each in methods.items():
        if has_cascade(each):
            raise ValueError(
                f"cascade is {each.cascade} for method {name!r}: expected 0, since the scores of all images are "
                "summed. Leave out cascade."
            )
    split = config.split
    run, positions = counterfactuals.run, queries.split(split)
    kept, trainings = config.subsets(len(run.data))
    # Attributions first: what is wrong with a method shows before hours of training.
    scores = {name: method_scores(run, name, each, queries, split) for name, each in methods.items()}
    losses = counterfactuals.results(trainings, "train on subsets")["loss"][:, positions]
    losses = losses.reshape(len(config.train_seeds), len(kept), len(positions))
    results = {name: lds(each, kept, losses) for name, each in scores.items()}
    ceiling, default = noise_ceiling(losses), results.get(DEFAULT)
    rows, per_query = [], []
    for name, result in sorted(results.items(), key=lambda item: -item[1].mean):
        difference = result.less(default) if default is not None and name != DEFAULT else Estimate(np.nan, np.nan)
        rows.append(
            {
                "method": name,
                "lds": result.mean,
                "error": result.error,
                "ceiling": ceiling,
                "difference": difference.mean,
                "difference_error": difference.error,
            }
        )
        per_query += [
            {"method": name, "query": query.prompt, "seed": query.seed, "lds": float(value)}
            for query, value in zip(queries.of(split), result.per_query)
        ]
    folder = run.root.workdir / "evaluation" / f"lds-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder, "lds_queries", per_query)
    write_table(folder, "lds", rows)
    table = write_table(run.root.workdir, "lds", rows)
    title = (
        f"LDS, {len(kept)} subsets of {config.lds_share:.0%} of the data, {len(config.train_seeds)} training seed(s), "
        f"{len(positions)} {split} queries"
    )
    bars = {name: (result.mean, result.low, result.high) for name, result in results.items()}
    bar_plot(folder / "lds.png", title, "Spearman correlation (mean, 95 % interval)", bars)
    return results, f"{title}\n\n{table}"
