"""Reading a data set's pictures in batches, for what encodes them tile by tile."""

import dataclasses
from collections.abc import Callable

import numpy as np

from attrib_jax.data.pictures import UnreadableRowError
from attrib_jax.data.sources import Dataset


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Rows -> (pictures, row ids) and the reasons of those that cannot be read; picklable, for worker processes.

    Attributes:
      dataset: what is read.
      size: (height, width) of the pictures, after `fit` where that is given.
      fit: makes a picture (H, W, 3) uint8 one of that size; None where the data set's have it, others are an error.
    """

    dataset: Dataset
    size: tuple[int, int]
    fit: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, rows: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], dict[int, str]]:
        images, reasons = np.zeros((len(rows), *self.size, 3), np.uint8), {}
        for place, row in enumerate(rows.tolist()):
            try:
                image = self.dataset[row].image
            except UnreadableRowError as error:
                reasons[row] = str(error)
                continue
            if self.fit is not None:
                image = self.fit(image)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"dataset {self.dataset.name!r} has a picture of {image.shape[:2]} pixels (height, width) at "
                    f"position {row}; the model was trained on {self.size}. Open the data set with "
                    f"resolution={self.size[0]}."
                )
            images[place] = image
        return (images, self.dataset.row_ids[rows]), reasons
