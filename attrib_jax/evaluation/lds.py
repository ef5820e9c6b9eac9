"""The linear datamodeling score: do summed scores predict the losses of models trained on half of the data?"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from attrib_jax.core.settings import setting
from attrib_jax.evaluation.counterfactual import Counterfactuals
from attrib_jax.evaluation.metrics import Lds, half_subsets, lds
from attrib_jax.evaluation.named import QuerySet, SplitSettings, has_cascade, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.tables import bar_plot, write_table
from attrib_jax.methods.base import MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LdsConfig(SplitSettings):
    """Which models are trained: one on each random subset, all with one seed, so that they differ by images alone."""

    lds_models: int = setting(64, "Number of random subsets, and of models.", low=3)
    lds_share: float = setting(0.5, "Share of the data set that a model is trained on.", low=0, high=1)
    lds_seed: int = setting(0, "Seed of the subsets.", low=0, high=2**32 - 1)

    def subsets(self, size: int) -> tuple[np.ndarray, list[Training]]:
        """(M, N) bool, the images that each model keeps, and the trainings without the others.

        Raises ValueError where the share leaves none of the images, or all.
        """
        count = round(self.lds_share * size)
        if not 0 < count < size:
            raise ValueError(
                f"lds_share is {self.lds_share}, {count} of {size} images: expected some and not all. Change lds_share."
            )
        kept = half_subsets(size, self.lds_models, self.lds_share, self.lds_seed)
        return kept, [Training(np.flatnonzero(~row)) for row in kept]


def run_lds(
    counterfactuals: Counterfactuals,
    methods: Mapping[str, MethodConfig],
    queries: QuerySet,
    config: LdsConfig,
) -> tuple[dict[str, Lds], str]:
    """The linear datamodeling score of each method on the queries of one split -> results and a markdown table.

    The table, `lds.csv`, and a plot are kept in the workdir.

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
    scores = {name: method_scores(run, name, each, queries.of(split)) for name, each in methods.items()}
    losses = counterfactuals.results(trainings, "train on subsets")["loss"]
    results = {name: lds(each, kept, losses[:, positions]) for name, each in scores.items()}
    rows = [
        {
            "method": name,
            "LDS": result.mean,
            "low": result.low,
            "high": result.high,
            "standard error over queries": float(np.std(result.per_query, ddof=1) / np.sqrt(len(positions)))
            if len(positions) > 1
            else float("nan"),
        }
        for name, result in sorted(results.items(), key=lambda item: -item[1].mean)
    ]
    folder = run.root.workdir / "evaluation" / f"lds-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    table = write_table(folder, "lds", rows)
    title = f"LDS, {len(trainings)} models on {config.lds_share:.0%} of the data, {len(positions)} {split} queries"
    bars = {name: (result.mean, result.low, result.high) for name, result in results.items()}
    bar_plot(folder / "lds.png", title, "Spearman correlation (mean, 95 % interval)", bars)
    return results, f"{title}\n\n{table}"
