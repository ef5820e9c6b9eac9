"""The similarity baselines by name (METHOD.md section 7), and what they need: a tower, and maybe AbC's mapping."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from attrib_jax.convert.tower import tower_fingerprint

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
# Methods that compare the query with training pictures, without the model.
SIMILARITIES = ("pixel", *TOWER_METHODS)


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """The tower whose features are compared.

    Attributes:
      tower: folder in the transformers layout, or Hugging Face id, see `load_tower`.
      head: file of a linear mapping of the features, see `load_head`; of `clip-abc` and `dino-abc` alone.
    """

    tower: str | None = None
    head: str | None = None

    def check(self, method: str) -> None:
        """Raises ValueError where `method` needs a tower or a head that is not given."""
        if method not in TOWER_METHODS:
            return
        needs = TOWER_METHODS[method]
        if self.tower is None:
            raise ValueError(
                f"method {method!r} needs a tower: give --tower (features=FeatureSettings(tower=...)), a transformers "
                f"folder or Hugging Face id such as {needs.example}"
            )
        if needs.mapped and self.head is None:
            raise ValueError(
                f"method {method!r} maps the tower's features: give --feature_head (features=FeatureSettings(head=...))"
                f", a file with one matrix; without a mapping take method {needs.family!r}"
            )

    def describe(self, method: str) -> dict[str, Any]:
        """What decides the scores of `method`: the contents of the files that it reads, as JSON values."""
        if method not in TOWER_METHODS:
            return {}
        described = {"tower": tower_fingerprint(self.tower)}
        if TOWER_METHODS[method].mapped:
            with open(self.head, "rb") as file:
                described["head"] = hashlib.file_digest(file, "sha256").hexdigest()
        return {"features": described}


def default_tower(method: str, dataset_name: str) -> str | None:
    """The tower that comes with the repository, for the methods and the data set that it was trained for, else None."""
    fits = method in ("clip", "clip-text") and dataset_name == "openmoji" and os.path.isdir(_SHIPPED)
    return os.fspath(_SHIPPED) if fits else None
