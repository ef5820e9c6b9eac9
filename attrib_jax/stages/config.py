"""How to attribute: one frozen record of every setting, checked."""

import dataclasses
import hashlib
from typing import Any

from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.core.checks import check_choice, check_positive, check_range
from attrib_jax.core.weights import WEIGHT_SUBSETS
from attrib_jax.stages.fisher import fisher_file

METHODS = ("unlearn", "random")
CAPTIONS = ("first", "all")


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
    """How to attribute; METHOD.md sections 3 to 6.

    Attributes:
      method: `unlearn`, or `random` (uniform scores, the floor that a method has to beat).
      weights: the subset that moves, see `WEIGHT_SUBSETS`.
      update: `newton` (eq. 5) or `sgd` (plain ascent without F).
      step_size: alpha of a step.
      steps: unlearning steps.
      query_draws: (t, noise) draws averaged into the gradient of each step.
      damping: added to F.
      keep_ewc_gradient: keep the pull towards the first weights (appendix A.2).
      num_examples: N of the Newton step; None for the size of the data set.
      fisher_samples: (picture, flip, caption, t, noise) samples that F is fitted on.
      fisher: file or stage folder of an F fitted elsewhere, as on the base of a customised model; None fits it here.
      stride: of the strided loss sum over timesteps.
      captions: `first` or `all` captions of a picture, their losses averaged.
      flips: `max` or `mean` of the two mirror images' scores, or `none` for the picture as is.
      loss_seed: of the noise of the scores, of F and of the query's draws: another query reuses the base losses.
      region: (x0, y0, x1, y1) in query pixels; only these count in the query's loss. None for all.
      batch_size: examples in flight; changes speed and memory only. 0 is automatic.
    """

    method: str = "unlearn"
    weights: str = "cross-attn-kv"
    update: str = "newton"
    step_size: float = 0.01
    steps: int = 1
    query_draws: int = 2048
    damping: float = 0.0
    keep_ewc_gradient: bool = False
    num_examples: int | None = None
    fisher_samples: int = 16384
    fisher: str | None = None
    stride: int = 100
    captions: str = "first"
    flips: str = "max"
    loss_seed: int = 0
    region: tuple[int, int, int, int] | None = None
    batch_size: int = 0

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_choice("weights", self.weights, WEIGHT_SUBSETS)
        check_choice("update", self.update, UPDATES)
        check_choice("captions", self.captions, CAPTIONS)
        check_choice("flips", self.flips, FLIP_RULES)
        for name in ("steps", "query_draws", "fisher_samples", "stride"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("step_size", self.step_size)
        check_range("damping", self.damping, 0.0)
        check_range("batch_size", self.batch_size, 0, integer=True)
        check_range("loss_seed", self.loss_seed, 0, 2**32 - 1, integer=True)
        if self.num_examples is not None:
            check_positive("num_examples", self.num_examples, integer=True)
        if self.update == "sgd" and (self.damping or self.keep_ewc_gradient):
            raise ValueError("damping and keep_ewc_gradient belong to update='newton'; 'sgd' has no F")

    @property
    def num_flips(self) -> int:
        return 1 if self.flips == "none" else 2

    def settings(self) -> dict[str, Any]:
        """What decides the scores: everything but the batch size, and of an F from elsewhere its content."""
        settings = dataclasses.asdict(self)
        del settings["batch_size"]
        if self.fisher is not None:
            with open(fisher_file(self.fisher), "rb") as file:
                settings["fisher"] = hashlib.file_digest(file, "sha256").hexdigest()
        return settings
