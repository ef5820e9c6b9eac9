"""Methods `clip`, `clip-text`, `dino`, `dinov2`, `clip-abc`, `dino-abc`: similarity of a tower's features.

docs/METHOD.md section 7. The features of a data set are a stage that all queries share.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attrib_jax.core.fingerprint import file_digest
from attrib_jax.core.settings import setting
from attrib_jax.jobs.context import Run, check_images
from attrib_jax.jobs.settings import CaptionSettings, FlipSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored

# The small CLIP that comes with the repository, trained on OpenMoji.
_SHIPPED = Path(__file__).parents[2] / "models" / "openmoji_tower"


class TowerMethod(NamedTuple):
    """One baseline: the family of its tower, the published one, and whether it compares texts or mapped features."""

    family: str
    example: str
    text: bool = False
    mapped: bool = False


_CLIP, _DINO = ("clip", "openai/clip-vit-base-patch32"), ("dino", "facebook/dino-vitb16")
TOWER_METHODS = {
    "clip": TowerMethod(*_CLIP),
    "clip-text": TowerMethod(*_CLIP, text=True),
    "dino": TowerMethod(*_DINO),
    "dinov2": TowerMethod("dinov2", "facebook/dinov2-with-registers-large"),
    "clip-abc": TowerMethod(*_CLIP, mapped=True),
    "dino-abc": TowerMethod(*_DINO, mapped=True),
}


def _names(text: bool = False, mapped: bool = False) -> tuple[str, ...]:
    return tuple(name for name, method in TOWER_METHODS.items() if (method.text, method.mapped) == (text, mapped))


def _tower_content(tower: str) -> str:
    from attrib_jax.convert.tower import tower_fingerprint

    return tower_fingerprint(tower)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig(MethodConfig):
    """The feature tower, which all of these methods read."""

    tower: str | None = setting(
        None,
        "Feature tower: a folder in the transformers layout or a Hugging Face id; for clip and clip-text on OpenMoji "
        "the one that comes with the repository.",
        path=True,
        content=_tower_content,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.tower is None:
            raise ValueError(
                f"tower is None: method {self.method!r} expected a transformers folder or Hugging Face id such as "
                f"{TOWER_METHODS[self.method].example}. Give --tower."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig(TowerConfig, FlipSettings):
    """Settings of the similarity of image features."""

    method: str = setting("clip", "Attribution method.", choices=_names())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeatureConfig(TowerConfig, CaptionSettings):
    """Settings of the similarity of text features."""

    method: str = setting("clip-text", "Attribution method.", choices=_names(text=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedFeatureConfig(FeatureConfig):
    """Settings of the similarity of image features under a linear mapping (AbC)."""

    method: str = setting("clip-abc", "Attribution method.", choices=_names(mapped=True))
    feature_head: str | None = setting(
        None,
        "File with one matrix, the linear mapping of the features; of clip-abc and dino-abc.",
        path=True,
        content=lambda path: file_digest(Path(path)),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.feature_head is None:
            raise ValueError(
                f"feature_head is None: method {self.method!r} expected a file with one matrix. Give --feature_head, "
                f"or take method {TOWER_METHODS[self.method].family!r}, which maps nothing."
            )


def default_tower(method: str, dataset_name: str) -> str | None:
    """The tower that comes with the repository, for the methods and the data set that it was trained for, else None."""
    fits = method in ("clip", "clip-text") and dataset_name == "openmoji" and os.path.isdir(_SHIPPED)
    return os.fspath(_SHIPPED) if fits else None


def prepare(run: Run, config: TowerConfig) -> Any:
    """Features of the data set, computed, resumed or reused; one stage for each tower."""
    check_images(run.dataset, config.method)
    # A tower and its libraries are loaded for these methods alone.
    from attrib_jax.methods.tower_features import prepare_features

    return prepare_features(run, config, TOWER_METHODS[config.method])


def score(run: Run, queries: Sequence[QueryJob], config: Any) -> list[Scored]:
    """Cosine similarities of a tower's features of the query and of each training image.

    Images are compared as they are and mirrored, and `config.flips` says what to make of the two. `clip-text` compares
    the query's prompt with the first caption of each image, or with all, the largest counting, as `config.captions`
    says.
    """
    from attrib_jax.methods.tower_features import score_features

    return score_features(run, queries, config, prepare(run, config))
