"""A data set as the denoiser sees it: latents and conditioning, in memory or on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core.checks import nonfinite_rows
from attrib_jax.data.latents import VIEWS
from attrib_jax.data.protocol import Dataset
from attrib_jax.storage.joined import JoinedArray


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDataset:
    """Latents and conditioning of N training images; the arrays may be numpy's, memory-mapped, or `JoinedArray`s.

    An example's conditioning is its text states alone, or, where there is more, a dict of these as "text" and of the
    leaves of `by_caption` and `by_image` under their names.

    Attributes:
      row_ids: (N,) int32.
      latents: (R, 2, h, w, c), of all stored images; [:, 1] of the mirrored image.
      text: (M, L, d), the text states of all captions of all stored images, one image after the other.
      first_caption: (R + 1,) int64; the captions of stored image r are text[first_caption[r]:first_caption[r + 1]].
      positions: (N,) where the images lie among the R stored ones, of which some may be left out; None for all.
      skipped: image -> why it was left out.
      source: name of the data set, for messages.
      by_caption: further leaves that a caption decides, such as "pooled" (M, p) or "mask" (M, L); ordered as `text`.
      by_image: further leaves that an image decides, such as "ids" (R, 6); ordered as `latents`.
    """

    row_ids: np.ndarray
    latents: Any
    text: Any
    first_caption: np.ndarray
    positions: np.ndarray = None  # type: ignore[assignment]  # an array once it is made
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    source: str = "the data set"
    by_caption: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_image: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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

    def inputs(self, row: Any, flip: Any, caption: Any) -> tuple[np.ndarray, Any]:
        """The denoiser's inputs for examples (image, flip, caption), each index (n,) or an integer for all.

        `row` counts from 0 to N - 1. Returns latents (n, h, w, c) and the conditioning, leaves (n, ...), in float32.

        Raises:
          ValueError: one holds NaN or infinity; it names the row, since later only the model could be blamed.
        """
        asked = np.atleast_1d(row)
        latents = self.views(asked, flip)
        row = self.positions[asked]
        caption = np.broadcast_to(np.asarray(caption, np.int64), row.shape)
        captions = self.first_caption[row] + caption
        text = np.asarray(self.text[captions], np.float32)
        more = {name: np.asarray(array[captions], np.float32) for name, array in self.by_caption.items()}
        for what, values in {"text states": text, **more}.items():
            for place in nonfinite_rows(values)[:1]:
                self._refuse(asked[place], f"{what} (caption {int(caption[place])})")
        more |= {name: np.asarray(array[row], np.float32) for name, array in self.by_image.items()}
        return latents, {"text": text, **more} if more else text

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


def encoded_queries(row_ids: np.ndarray, latents: np.ndarray, conditioning: Any, source: str) -> EncodedDataset:
    """Queries as a data set of images without mirror images, each with one caption.

    Args:
      row_ids: (Q,).
      latents: (Q, h, w, c).
      conditioning: its leaves (Q, ...).
      source: name, for messages.
    """
    by_caption = dict(conditioning) if isinstance(conditioning, Mapping) else {"text": conditioning}
    text = by_caption.pop("text")
    first_caption = np.arange(len(latents) + 1)
    return EncodedDataset(row_ids, latents[:, None], text, first_caption, source=source, by_caption=by_caption)


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
    for name in ("by_caption", "by_image"):
        kinds = [sorted(getattr(part, name)) for part in parts]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the two data sets have conditioning {kinds[0]} and {kinds[1]} {name.replace('_', ' ')}")
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
        by_caption={name: JoinedArray.of([part.by_caption[name] for part in parts]) for name in first.by_caption},
        by_image={name: JoinedArray.of([part.by_image[name] for part in parts]) for name in first.by_image},
    )
