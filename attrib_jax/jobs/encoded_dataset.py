"""A data set as the UNet sees it: latents and text states, in memory or on disk."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core.checks import nonfinite_rows
from attrib_jax.data.latents import VIEWS
from attrib_jax.data.protocol import Dataset
from attrib_jax.storage.joined import JoinedArray


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDataset:
    """Latents and text states of N training images; the arrays may be numpy's, memory-mapped, or `JoinedArray`s.

    Attributes:
      row_ids: (N,) int32.
      latents: (R, 2, h, w, c), of all stored images; [:, 1] of the mirrored image.
      text: (M, L, d), the text states of all captions of all stored images, one image after the other.
      first_caption: (R + 1,) int64; the captions of stored image r are text[first_caption[r]:first_caption[r + 1]].
      positions: (N,) where the images lie among the R stored ones, of which some may be left out; None for all.
      skipped: image -> why it was left out.
      source: name of the data set, for messages.
    """

    row_ids: np.ndarray
    latents: Any
    text: Any
    first_caption: np.ndarray
    positions: np.ndarray = None  # type: ignore[assignment]  # an array once it is made
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    source: str = "the data set"

    def __post_init__(self):
        if self.positions is None:
            object.__setattr__(self, "positions", np.arange(len(self.row_ids)))

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def num_captions(self) -> np.ndarray:
        """(N,) captions of each row."""
        return np.diff(self.first_caption)[self.positions]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, c)."""
        return tuple(self.latents.shape[2:])

    @property
    def text_shape(self) -> tuple[int, int]:
        """(L, d) of a caption's states."""
        return tuple(self.text.shape[1:])

    def inputs(self, row: Any, flip: Any, caption: Any) -> tuple[np.ndarray, np.ndarray]:
        """The UNet's inputs for examples (image, flip, caption), each index (n,) or an integer for all.

        `row` counts from 0 to N - 1. Returns latents (n, h, w, c) and text states (n, L, d), float32.

        Raises:
          ValueError: one holds NaN or infinity; it names the row, since later only the model could be blamed.
        """
        asked = np.atleast_1d(row)
        latents = self.views(asked, flip)
        row = self.positions[asked]
        caption = np.broadcast_to(np.asarray(caption, np.int64), row.shape)
        text = np.asarray(self.text[self.first_caption[row] + caption], np.float32)
        for place in nonfinite_rows(text)[:1]:
            self._refuse(asked[place], f"text states (caption {int(caption[place])})")
        return latents, text

    def views(self, row: Any, flip: Any) -> np.ndarray:
        """The latents (n, h, w, c) of images and mirror images, as in `inputs`, without reading any text."""
        asked = np.atleast_1d(row)
        flip = np.broadcast_to(np.asarray(flip, np.int64), asked.shape)
        latents = np.asarray(self.latents[self.positions[asked], flip], np.float32)
        for place in nonfinite_rows(latents)[:1]:
            self._refuse(asked[place], f"latents ({VIEWS[int(flip[place])]})")
        return latents

    def _refuse(self, row: int, what: str) -> None:
        raise ValueError(
            f"row {int(self.row_ids[row])} of {self.source} has {what} that are NaN or infinite: encode that row "
            "again, or take it out of the data set"
        )


class CaptionRows(NamedTuple):
    """M captions of a data set's images, one image's after another's; each (M,) int64.

    Attributes:
      image: position of the image, from 0 to N - 1, rising.
      caption: index among that image's captions.
      text: row of its text states in `EncodedDataset.text`.
    """

    image: np.ndarray
    caption: np.ndarray
    text: np.ndarray


def caption_rows(data: EncodedDataset, captions: str) -> CaptionRows:
    """The captions of all images that count: the `first` of each, or `all`."""
    counts = data.num_captions if captions == "all" else np.ones(len(data), np.int64)
    image = np.repeat(np.arange(len(data)), counts)
    caption = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    return CaptionRows(image, caption, data.first_caption[data.positions[image]] + caption)


def caption_texts(dataset: Dataset, data: EncodedDataset, rows: CaptionRows) -> list[str]:
    """The captions themselves, found in the data set that was encoded by their images' row ids."""
    places = {int(row_id): place for place, row_id in enumerate(dataset.row_ids)}
    images = [places[int(row_id)] for row_id in data.row_ids[rows.image]]
    return [dataset.captions(image)[caption] for image, caption in zip(images, rows.caption)]


def join(first: EncodedDataset, second: EncodedDataset, row_ids: np.ndarray) -> EncodedDataset:
    """One data set after another, under new row ids (N1 + N2,).

    Raises ValueError where the shapes of their latents or text states differ.
    """
    parts = [first, second]
    for name in ("latents", "text"):
        shapes = [tuple(getattr(part, name).shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the two data sets have {name} of shapes {shapes[0]} and {shapes[1]}; expected one shape")
    stored = len(first.first_caption) - 1
    return EncodedDataset(
        row_ids=row_ids,
        latents=JoinedArray.of([part.latents for part in parts]),
        text=JoinedArray.of([part.text for part in parts]),
        first_caption=np.concatenate([first.first_caption[:-1], second.first_caption + first.first_caption[-1]]),
        positions=np.concatenate([first.positions, second.positions + stored]),
        source=f"{first.source}+{second.source}",
        skipped=first.skipped | {stored + row: reason for row, reason in second.skipped.items()},
    )
