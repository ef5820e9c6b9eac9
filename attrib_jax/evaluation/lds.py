"""The linear datamodeling score: do summed scores predict the losses of models trained on half of the data?"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from attrib_jax.core.checks import check_positive, check_range
from attrib_jax.evaluation.counterfactual import Counterfactuals
from attrib_jax.evaluation.metrics import Lds, half_subsets, lds
from attrib_jax.evaluation.named import QuerySet, has_cascade, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.tables import bar_plot, write_table
from attrib_jax.methods.base import MethodConfig


@dataclasses.dataclass(frozen=True)
class LdsConfig:
    """Which models are trained.

    Attributes:
      models: number of random subsets, one model each.
      share: of the data set in a subset.
      subset_seed: of the subsets.
      seed: of the trainings, the same for all: they differ by their pictures alone.
    """

    models: int = 64
    share: float = 0.5
    subset_seed: int = 0
    seed: int = 0

    def __post_init__(self):
        check_positive("lds_models", self.models, integer=True)
        if self.models < 3:
            raise ValueError(f"lds_models is {self.models}; expected at least 3, to correlate over")
        check_range("lds_share", self.share, 0.0, 1.0)

    def subsets(self, size: int) -> tuple[np.ndarray, list[Training]]:
        """(M, N) bool of the pictures kept, and the trainings without the others.

        Raises ValueError where the share leaves none of the pictures, or all.
        """
        if not 0 < round(self.share * size) < size:
            raise ValueError(
                f"lds_share is {self.share}, {round(self.share * size)} of {size} pictures; expected a part of them"
            )
        kept = half_subsets(size, self.models, self.share, self.subset_seed)
        return kept, [Training(np.flatnonzero(~row), self.seed) for row in kept]


def run_lds(
    counterfactuals: Counterfactuals,
    methods: Mapping[str, MethodConfig],
    queries: QuerySet,
    split: str,
    config: LdsConfig,
) -> tuple[dict[str, Lds], str]:
    """The score of each method on one split -> results and a markdown table.

    The table, `lds.csv`, and a plot are kept in the workdir.

    Raises ValueError for a method with a cascade, which has no scores of most pictures to sum.
    """
    for name, each in methods.items():
        if has_cascade(each):
            raise ValueError(f"method {name!r} has a cascade, and sums need the scores of all pictures; leave it out")
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
    title = f"LDS, {len(trainings)} models on {config.share:.0%} of the data, {len(positions)} {split} queries"
    bars = {name: (result.mean, result.low, result.high) for name, result in results.items()}
    bar_plot(folder / "lds.png", title, "Spearman correlation (mean, 95 % interval)", bars)
    return results, f"{title}\n\n{table}"
