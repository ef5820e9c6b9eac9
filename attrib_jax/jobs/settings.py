"""Settings that several methods share, each declared once; a method's config inherits from those that it reads.

The equations and symbols are those of docs/METHOD.md.
"""

import dataclasses
import math
from pathlib import Path

from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.core.fingerprint import file_digest
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.weights import WEIGHT_SUBSETS
from attrib_jax.curvature.ekfac import RELATIVE_DAMPING
from attrib_jax.curvature.fisher_files import fisher_file
from attrib_jax.models.predictor import PRECISIONS

CURVATURES = ("diagonal", "ekfac")
CAPTIONS = ("first", "all")
SCORES = ("exact", "linear")
# Of `PassSettings` and of the residual product, where it is on by default and counts the query too.
SHARED_NOISE_HELP = "Whether all images that are scored have the same noise at a timestep, or each its own."
_MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings(Settings):
    """Which weights an attribution moves, or takes gradients by."""

    weights: str = setting(
        "cross-attn-kv",
        "Weights that move: the key and value projections of cross-attention, all weights of cross-attention, those of "
        "all attention layers, those of the feed-forward layers (mlp), the factors of the LoRA of --lora, or all "
        "weights.",
        choices=tuple(WEIGHT_SUBSETS),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """The seed of every random draw of an attribution."""

    loss_seed: int = setting(
        0,
        "Seed of the noise of losses, of the Fisher information's samples and of the query's draws; queries with the "
        "same seed share the losses before unlearning.",
        low=0,
        high=_MAX_SEED,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """How the denoiser's weights lie on the devices."""

    model_parallel: int = setting(
        0,
        "Devices that divide the denoiser's weights, F and the weights that move among themselves; a divisor of the "
        "number of devices. 0 takes the fewest on which they fit, 1 on a CPU.",
        low=0,
        performance=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvatureSettings(WeightSettings, NoiseSettings, DeviceSettings):
    """F of the Newton step and of the influence function."""

    curvature: str = setting(
        "diagonal",
        "Curvature F: the diagonal Fisher information, or EKFAC (with which unlearning is AbU+).",
        choices=CURVATURES,
        symbol="F",
    )
    damping: float = setting(0.0, "Number added to F, in its own units.", low=0)
    ekfac_damping: float = setting(
        RELATIVE_DAMPING,
        "Share of the mean eigenvalue of each layer that is added to its eigenvalues.",
        low=0,
        only_if=("curvature", "ekfac"),
    )
    fisher_samples: int = setting(
        16384, "Number of (image, flip, caption, timestep, noise) samples that F is fitted on.", low=1
    )
    fisher: str | None = setting(
        None,
        "File or stage folder of a diagonal F that was fitted elsewhere, such as on the base of a customised model; if "
        "not given, F is fitted here.",
        path=True,
        only_if=("curvature", "diagonal"),
        content=lambda path: file_digest(fisher_file(path)),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.curvature == "ekfac" and self.model_parallel > 1:
            raise ValueError(
                f"model_parallel is {self.model_parallel} and curvature is 'ekfac', whose factors every device holds "
                "whole: expected model_parallel=1 with EKFAC. Change model_parallel, or take curvature='diagonal'."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryDrawSettings(NoiseSettings):
    """How the query's gradient is averaged."""

    query_draws: int = setting(
        2048, "Number of (timestep, noise) draws that the query's gradient is averaged over at each step.", low=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionSettings(Settings):
    """Which part of the query counts (docs/METHOD.md section 5)."""

    region: tuple[int, int, int, int] | None = setting(
        None,
        "Box x0,y0,x1,y1 of the query as the model sees it (query.png): only its loss inside the box is unlearned.",
        unit="pixels",
    )
    region_mask: str | None = setting(
        None,
        "PNG file as large as query.png: only the loss where it is not black is unlearned, instead of a box.",
        path=True,
        content=lambda path: file_digest(Path(path)),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.region is not None and len(self.region) != 4:
            raise ValueError(f"region is {self.region}: expected four whole numbers x0,y0,x1,y1. Change region.")
        if self.region is not None and self.region_mask is not None:
            raise ValueError(
                f"region is {self.region} and region_mask is {self.region_mask!r}: expected one of them. Leave one out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipSettings(Settings):
    """How an image and its mirror image make one score."""

    flips: str = setting(
        "max",
        "Score of an image: the larger one of its own and its mirror image's, their mean, or its own alone (none).",
        choices=FLIP_RULES,
    )

    @property
    def num_flips(self) -> int:
        """Images that are scored for each training image: 2 with its mirror image, 1 without."""
        return 1 if self.flips == "none" else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionSettings(Settings):
    """Which captions of a training image count."""

    captions: str = setting(
        "first",
        "Captions of a training image that count: the first one, or all (losses are averaged, similarities maximised).",
        choices=CAPTIONS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSettings(NoiseSettings, FlipSettings, CaptionSettings):
    """Losses of the training images, at whatever timesteps."""

    precision: str = setting(
        "float32",
        "Compute precision of the scores' losses; F and unlearning are always computed in float32. On accelerators "
        "take tensorfloat32.",
        choices=PRECISIONS,
    )
    batch_size: int = setting(0, "Examples in flight; 0 chooses automatically.", low=0, performance=True)

    @property
    def image_seed(self) -> int:
        """Seed of the noise under which training images are scored."""
        return self.loss_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings(ExampleSettings):
    """The strided losses of the training images (docs/METHOD.md sections 2 and 4)."""

    stride: int = setting(
        100, "Distance of the timesteps 0, stride, 2 stride, ... that a loss is averaged over.", low=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueriesSettings(Settings):
    """How many queries one pass over the data set scores."""

    queries_per_pass: int = setting(
        0, "Queries scored in one pass over the data set; 0 chooses by memory.", low=0, performance=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassSettings(LossSettings, QueriesSettings):
    """Scoring in one pass over the data set, of all images or coarse to fine."""

    shared_noise: bool = setting(False, SHARED_NOISE_HELP, omit_default=True)
    noise_seed: int | None = setting(
        None,
        "Seed of the noise under which training images are scored, where it is not to be --loss_seed: F and the "
        "unlearned weights stay the same.",
        low=0,
        high=_MAX_SEED,
        omit_default=True,
    )
    cascade: float = setting(
        0.0,
        "Share of the images, the best by a coarse score, that is scored at the full setting; 0 scores all of them.",
        low=0,
        high=1,
    )
    cascade_stride: int = setting(
        250, "Stride of the coarse scores, which use the first caption; at least --stride.", low=1, only_if="cascade"
    )
    cascade_min: int = setting(
        1000, "Least number of images that a cascade scores at the full setting.", low=1, only_if="cascade"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.cascade and self.cascade_stride < self.stride:
            raise ValueError(
                f"cascade_stride is {self.cascade_stride}: expected at least stride, {self.stride}, so that the coarse "
                "scores are the cheaper ones. Change cascade_stride."
            )

    @property
    def image_seed(self) -> int:
        """Seed of the noise under which training images are scored."""
        return self.loss_seed if self.noise_seed is None else self.noise_seed

    def coarse(self) -> "PassSettings":
        """The setting of the coarse scores of a cascade."""
        plain = {name: getattr(type(self), name) for name in ("cascade_stride", "cascade_min")}
        return dataclasses.replace(self, stride=self.cascade_stride, captions="first", cascade=0.0, **plain)

    def num_finalists(self, size: int) -> int:
        """Number of images, of `size`, that a cascade scores at the full setting."""
        return min(size, max(math.ceil(self.cascade * size), self.cascade_min))
