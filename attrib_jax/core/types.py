"""The two records that travel through the library: a batch of training examples, and the scores of a data set."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core.checks import check_positive


class Batch(NamedTuple):
    """B training examples, each one (image, flip, caption); a pytree, so it passes through `jit`, `vmap` and `scan`.

    Attributes:
      latents: (B, h, w, c) float32, multiplied by the autoencoder's scaling factor; of the mirror image if flipped.
      text: what the model is conditioned on, a pytree of leaves (B, ...): for Stable Diffusion 1 and 2 the float32 text
        states (B, L, d) of the example's caption; for Stable Diffusion XL a dict of these as `text`, of the `pooled`
        text (B, p), and of the size `ids` (B, 6).
      row_id: (B,) int32, the image's row in the data set, whatever the order of the batch.
      flip: (B,) int32, 1 for the mirror image.
      caption: (B,) int32, index of the caption among the image's captions.
      mask: (B,) 1 for an example, 0 for padding.
    """

    latents: Any
    text: Any
    row_id: Any
    flip: Any
    caption: Any
    mask: Any


def ranking(scores: np.ndarray, row_id: np.ndarray) -> np.ndarray:
    """Positions (N,) of N images from the most influential on; equal scores by rising row id, whatever their order."""
    return np.lexsort((row_id, -np.asarray(scores)))


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Influence of N training images on one query; numpy arrays, one row an image, in any order of images.

    Attributes:
      row_id: (N,) integers, unique: which training image.
      score: (N,) floats, larger is more influential; for unlearning a loss difference, about 0 for unrelated images.
      loss_before: (N, flips) losses under the original weights, or None for methods without them.
      loss_after: (N, flips) losses under the unlearned weights, or None.
      flip: (N,) integers, the flip that gave the score (0 as is, 1 mirrored), or None.

    Raises:
      ValueError: lengths differ, row ids are not integers or one occurs twice, or a score is NaN or infinite.
    """

    row_id: np.ndarray
    score: np.ndarray
    loss_before: np.ndarray | None = None
    loss_after: np.ndarray | None = None
    flip: np.ndarray | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name not in ("row_id", "score"):
                continue
            object.__setattr__(self, field.name, np.asarray(value))
            if getattr(self, field.name).shape[:1] != self.row_id.shape:
                raise ValueError(
                    f"{field.name} has shape {np.shape(value)}, but row_id has shape {self.row_id.shape}: "
                    "expected one row for each image."
                )
        if self.row_id.ndim != 1 or self.score.ndim != 1:
            raise ValueError(
                f"row_id and score have shapes {self.row_id.shape} and {self.score.shape}; expected (N,), one number "
                "for each image"
            )
        if len(self.row_id) and not np.issubdtype(self.row_id.dtype, np.integer):
            raise ValueError(f"row_id has dtype {self.row_id.dtype}; expected integers")
        if not np.issubdtype(self.score.dtype, np.floating):
            # Unsigned numbers would not order by their negatives.
            object.__setattr__(self, "score", self.score.astype(np.float64))
        ids, counts = np.unique(self.row_id, return_counts=True)
        if len(ids) < len(self.row_id):
            raise ValueError(
                f"row_id holds {ids[counts > 1][:5].tolist()} more than once; give every image one row, "
                "its flips and captions already combined."
            )
        bad = ~np.isfinite(self.score)
        if bad.any():
            raise ValueError(
                f"score is NaN or infinite for {bad.sum()} of {len(bad)} images (row ids "
                f"{self.row_id[bad][:5].tolist()}, ...). Check the weights for NaN, or take a smaller step_size."
            )

    def __len__(self) -> int:
        return len(self.row_id)

    def top(self, k: int | None = None) -> "Scores":
        """The `k` most influential images (all of them by default), best first; equal scores by rising row id."""
        if k is not None:
            check_positive("k", k, integer=True)
        rows = ranking(self.score, self.row_id)[:k]
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken: dict[str, Any] = {name: None if array is None else array[rows] for name, array in arrays.items()}
        return Scores(**taken)

    def rank_of(self, row_id: int) -> int:
        """Rank of one image, 1 for the most influential; ties as in `top`. KeyError if it was not scored."""
        found = np.flatnonzero(self.row_id[ranking(self.score, self.row_id)] == row_id)
        if not found.size:
            raise KeyError(f"row_id={row_id} is not among the {len(self)} scored images.")
        return int(found[0]) + 1
