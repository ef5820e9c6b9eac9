"""Reading a data set's images: in batches, for what encodes them tile by tile, and one by one, for training."""

import dataclasses
import itertools
import logging
from collections.abc import Callable

import numpy as np

from attrib_jax.data.images import UnreadableRowError, cover
from attrib_jax.data.sources import Dataset

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Rows -> (images, row ids) and the reasons of those that cannot be read; picklable, for worker processes.

    With `size_ids` the images come with (B, 6) float32: their height and width before they were resized and cropped,
    top and left of the crop, height and width now.

    Attributes:
      dataset: data set that is read.
      size: (height, width) of the images, after `fit` where that is given.
      size_ids: whether the images' size ids come beside them.
      fit: makes an image (H, W, 3) uint8 one of that size; None where the data set's have it, others are an error.
    """

    dataset: Dataset
    size: tuple[int, int]
    fit: Callable[[np.ndarray], np.ndarray] | None = None
    size_ids: bool = False

    def __call__(self, rows: np.ndarray) -> tuple[tuple[np.ndarray, ...], dict[int, str]]:
        images, reasons = np.zeros((len(rows), *self.size, 3), np.uint8), {}
        ids = np.zeros((len(rows), 6), np.float32)
        for place, row in enumerate(rows.tolist()):
            try:
                image, _, _, original = self.dataset[row]
            except UnreadableRowError as error:
                reasons[row] = str(error)
                continue
            if self.fit is not None:
                image = self.fit(image)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"dataset {self.dataset.name!r} has an image of {image.shape[:2]} pixels (height, width) at "
                    f"position {row}; the model was trained on {self.size}. Open the data set with "
                    f"resolution={self.size[0]}."
                )
            images[place] = image
            original = original or self.size
            ids[place] = (*original, *cover(original, self.size)[1], *self.size)
        row_ids = self.dataset.row_ids[rows]
        return ((images, row_ids, ids) if self.size_ids else (images, row_ids)), reasons


def image_side(dataset: Dataset) -> int:
    """Pixels a side of the data set's images, by the first that can be read.

    Raises ValueError where that one is not square, and where there is none.
    """
    _, image = TrainingImages(dataset, None)(0)
    height, width = image.shape[:2]
    if height != width:
        raise ValueError(
            f"dataset {dataset.name!r} has images of {height} x {width} pixels; expected square ones. Give a "
            "--resolution that they are resized and cropped to."
        )
    return height


class TrainingImages:
    """Images of one size for training batches; the next one stands in for one that cannot be read."""

    def __init__(self, dataset: Dataset, side: int | None, rows: np.ndarray | None = None):
        """Takes the positions `rows` of the data set, all if None; `side` in pixels, any size if None."""
        self._dataset, self._side = dataset, side
        self._rows = np.arange(len(dataset)) if rows is None else rows
        self._noted: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, place: int) -> tuple[int, np.ndarray]:
        """The place in `rows` from `place` on, around the end, whose image can be read, and that (H, W, 3) uint8.

        Raises ValueError for an image of another size, and where none can be read.
        """
        for found in itertools.chain(range(place, len(self)), range(place)):
            row = int(self._rows[found])
            try:
                image = self._dataset[row].image
            except UnreadableRowError as error:
                if row not in self._noted:
                    self._noted.add(row)
                    _log.warning("left out: %s", error)
                continue
            if self._side is not None and image.shape[:2] != (self._side, self._side):
                raise ValueError(
                    f"dataset {self._dataset.name!r} has an image of {image.shape[0]} x {image.shape[1]} pixels at "
                    f"position {row}, and others of {self._side} x {self._side}; give a --resolution that all are "
                    "resized and cropped to"
                )
            return found, image
        raise ValueError(f"no image of dataset {self._dataset.name!r} can be read")
