"""How to attribute: one frozen record of every setting, checked."""

import dataclasses
import hashlib
import math
import os
from typing import Any

from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.core.checks import check_choice, check_positive, check_range
from attrib_jax.core.weights import WEIGHT_SUBSETS
from attrib_jax.curvature.ekfac import RELATIVE_DAMPING
from attrib_jax.jobs.fisher import fisher_file
from attrib_jax.methods.feature_settings import SIMILARITIES, FeatureSettings
from attrib_jax.methods.gradient_settings import PROJECTED_METHODS, GradientSettings
from attrib_jax.models.precision import PRECISIONS

METHODS = ("unlearn", "influence", "random", *PROJECTED_METHODS, *SIMILARITIES)
CURVATURES = ("diagonal", "ekfac")
SCORES = ("exact", "linear")
CAPTIONS = ("first", "all")
# What changes speed and memory only.
_PERFORMANCE = ("batch_size", "queries_per_pass")
# What the projected methods take beside `gradients`.
_PROJECTED = ("method", "weights", "query_draws", "stride", "captions", "flips", "loss_seed")


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
    """How to attribute; METHOD.md sections 3 to 6.

    Attributes:
      method: `unlearn`, `influence` (what one infinitesimal Newton step scores), `random` (uniform scores, the floor
        that a method has to beat), one of `SIMILARITIES`, or one of the projected methods `trak`, `journey-trak`,
        `d-trak`, `das` (METHOD.md sections 7 and 10). The projected take weights, query_draws, stride, captions, flips,
        loss_seed, precision and `gradients`. All but the first two refuse region, cascade, score and fisher.
      weights: the subset that moves, see `WEIGHT_SUBSETS`.
      update: `newton` (eq. 5) or `sgd` (plain ascent without F).
      step_size: alpha of a step.
      steps: unlearning steps.
      query_draws: (t, noise) draws averaged into the gradient of each step.
      curvature: F of the Newton step: `diagonal`, or `ekfac` (METHOD.md section 10), with which unlearning is AbU+.
      damping: added to F, in its own units.
      ekfac_damping: with `ekfac`, the share of each layer's mean eigenvalue that is added to its eigenvalues.
      keep_ewc_gradient: keep the pull towards the first weights (appendix A.2).
      num_examples: N of the Newton step; None for the size of the data set.
      fisher_samples: (picture, flip, caption, t, noise) samples that F is fitted on.
      fisher: file or stage folder of an F fitted elsewhere, as on the base of a customised model; None fits it here.
      score: `exact`, the difference of two losses (METHOD.md section 4), or `linear`, the derivative of the loss along
        the weight change: no base losses, and many queries cost little more than one.
      stride: of the strided loss sum over timesteps.
      captions: `first` or `all` captions of a picture, their losses averaged.
      flips: `max` or `mean` of the two mirror images' scores, or `none` for the picture as is.
      loss_seed: of the noise of the scores, of F and of the query's draws: another query reuses the base losses.
      region: (x0, y0, x1, y1) in query pixels; only these count in the query's loss. None for all.
      region_mask: PNG file as large as the query's picture, instead of a box: only pixels that are not black count.
      precision: of the scores' losses, see `PRECISIONS`; F and unlearning are float32 always. On accelerators
        `tensorfloat32` is the one to take, for linear scores on a TPU `bfloat16-products`. `bfloat16` keeps the
        cross-attention keys and values in float32 and rounds all other weights, moved ones too. `bfloat16-all` rounds
        every weight, and with it most of the change that an exact score measures: it is there to be studied.
      cascade: coarse to fine: all pictures are scored at `cascade_stride` with their first caption, then this share of
        them, the best, at the full setting; 0 scores all at the full setting.
      cascade_stride: stride of the coarse scores, no finer than `stride`.
      cascade_min: the least number of pictures that a cascade scores at the full setting.
      gradients: of the projected methods, see `GradientSettings`.
      batch_size: examples in flight; changes speed and memory only. 0 is automatic.
      features: the tower of the similarities.
      queries_per_pass: queries scored in one pass over the data set; changes memory and speed only. 0 is automatic.
    """

    method: str = "unlearn"
    weights: str = "cross-attn-kv"
    update: str = "newton"
    step_size: float = 0.01
    steps: int = 1
    query_draws: int = 2048
    curvature: str = "diagonal"
    damping: float = 0.0
    ekfac_damping: float = RELATIVE_DAMPING
    keep_ewc_gradient: bool = False
    num_examples: int | None = None
    fisher_samples: int = 16384
    fisher: str | None = None
    score: str = "exact"
    stride: int = 100
    captions: str = "first"
    flips: str = "max"
    loss_seed: int = 0
    region: tuple[int, int, int, int] | None = None
    region_mask: str | None = None
    precision: str = "float32"
    cascade: float = 0.0
    cascade_stride: int = 250
    cascade_min: int = 1000
    gradients: GradientSettings = GradientSettings()
    batch_size: int = 0
    queries_per_pass: int = 0
    features: FeatureSettings = FeatureSettings()

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_choice("weights", self.weights, WEIGHT_SUBSETS)
        check_choice("update", self.update, UPDATES)
        check_choice("curvature", self.curvature, CURVATURES)
        check_choice("score", self.score, SCORES)
        check_choice("captions", self.captions, CAPTIONS)
        check_choice("flips", self.flips, FLIP_RULES)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("steps", "query_draws", "fisher_samples", "stride", "cascade_stride", "cascade_min"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("step_size", self.step_size)
        check_range("damping", self.damping, 0.0)
        check_range("ekfac_damping", self.ekfac_damping, 0.0)
        for name in _PERFORMANCE:
            check_range(name, getattr(self, name), 0, integer=True)
        check_range("loss_seed", self.loss_seed, 0, 2**32 - 1, integer=True)
        self.features.check(self.method)
        if self.num_examples is not None:
            check_positive("num_examples", self.num_examples, integer=True)
        if self.update == "sgd" and (self.damping or self.keep_ewc_gradient):
            raise ValueError("damping and keep_ewc_gradient belong to update='newton'; 'sgd' has no F")
        self._check_curvature()
        if self.method == "influence" and (self.update, self.steps, self.keep_ewc_gradient) != ("newton", 1, False):
            raise ValueError(
                f"method='influence' is the limit of one Newton step, but update is {self.update!r}, steps "
                f"{self.steps} and keep_ewc_gradient {self.keep_ewc_gradient}; leave these at 'newton', 1 and False"
            )
        if self.region is not None and self.region_mask is not None:
            raise ValueError(f"region is {self.region} and region_mask {self.region_mask!r}; give one of them")
        check_range("cascade", self.cascade, 0.0, 1.0)
        if self.cascade and self.cascade_stride < self.stride:
            raise ValueError(
                f"cascade_stride is {self.cascade_stride}, finer than stride {self.stride}: expected at least the "
                "stride, so that the coarse scores are the cheaper ones. Change cascade_stride."
            )
        if self.method not in ("unlearn", "influence"):
            self._check_unused()

    def _check_unused(self) -> None:
        given = {
            "region": self.region is not None,
            "region_mask": self.region_mask is not None,
            "cascade": self.cascade > 0,
            "score": self.score != "exact",
            "fisher": self.fisher is not None,
            "update": self.update != "newton",
            "keep_ewc_gradient": self.keep_ewc_gradient,
            "curvature": self.curvature != "diagonal",
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, but method={self.method!r} has no use for it: it belongs to "
                f"methods 'unlearn' and 'influence'. Leave out {name}, or change the method."
            )

    def _check_curvature(self) -> None:
        if self.curvature == "diagonal":
            if self.ekfac_damping != RELATIVE_DAMPING:
                raise ValueError(
                    f"ekfac_damping is {self.ekfac_damping} but curvature 'diagonal'; give curvature='ekfac', or "
                    "damping for the diagonal."
                )
            return
        if self.update == "sgd":
            raise ValueError("curvature='ekfac' belongs to update='newton'; 'sgd' has no F")
        if self.fisher is not None:
            raise ValueError(
                f"fisher is {self.fisher!r} but curvature 'ekfac': such a file holds a diagonal F, and EKFAC is fitted "
                "here. Leave out fisher, or take curvature='diagonal'."
            )

    @property
    def num_flips(self) -> int:
        return 1 if self.flips == "none" else 2

    def coarse(self) -> "AttributeConfig":
        """The setting of the coarse scores of a cascade."""
        return dataclasses.replace(self, stride=self.cascade_stride, captions="first", cascade=0.0)

    def num_finalists(self, size: int) -> int:
        """How many of `size` pictures a cascade scores at the full setting."""
        return min(size, max(math.ceil(self.cascade * size), self.cascade_min))

    def settings(self) -> dict[str, Any]:
        """What decides the scores: not what only changes speed, and of files their content.

        `score`, `precision`, `curvature`, `region_mask` and the cascade are absent where they are off, so that results
        from before there were such settings still fit.
        """
        if self.method in PROJECTED_METHODS:
            settings = {name: getattr(self, name) for name in _PROJECTED}
            if self.precision != "float32":
                settings["precision"] = self.precision
            return settings | {"gradients": self.gradients.settings(self.method)}
        settings = dataclasses.asdict(self)
        for name in (*_PERFORMANCE, "gradients"):
            del settings[name]
        del settings["features"]
        if self.method in SIMILARITIES:
            settings |= self.features.describe(self.method)
        if not self.cascade:
            del settings["cascade_stride"], settings["cascade_min"]
        if self.curvature == "diagonal":
            del settings["ekfac_damping"]
        for field in dataclasses.fields(self):
            if (
                field.name in ("score", "precision", "curvature", "region_mask", "cascade")
                and settings[field.name] == field.default
            ):
                del settings[field.name]
        if self.fisher is not None:
            settings["fisher"] = _digest(fisher_file(self.fisher))
        if self.region_mask is not None:
            settings["region_mask"] = _digest(self.region_mask)
        return settings


def _digest(file: str | os.PathLike) -> str:
    """sha256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
