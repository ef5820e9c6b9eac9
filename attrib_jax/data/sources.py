"""Data sets of captioned pictures behind one small protocol: row id, image, captions."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from attrib_jax.core.checks import check_choice

_SOURCES = ("openmoji",)


class Row(NamedTuple):
    """One captioned picture: image (H, W, 3) uint8, its captions (at least one), and its row id."""

    image: np.ndarray
    captions: tuple[str, ...]
    row_id: int


class Dataset(Protocol):
    """Random access to captioned pictures; `dataset[i]` may be called from several threads.

    Attributes:
      name: as given to `--dataset`.
      row_ids: (N,) int32, distinct, the same on every machine.
      groups: (N,) int32 near-duplicate group of each row, or None.
      credit: the licence line that has to stand beside the pictures, or None.
      credit_url: of the licence, or None.
    """

    name: str
    row_ids: np.ndarray
    groups: np.ndarray | None
    credit: str | None
    credit_url: str | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def captions(self, index: int) -> tuple[str, ...]: ...

    def fingerprint(self) -> str: ...


def open_dataset(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Opens, and on first use prepares, a data set.

    Args:
      name: `openmoji`.
      data_dir: where prepared data sets are kept; TFDS's own default (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`) if
        None.

    Raises:
      ValueError: an unknown name; the message suggests the nearest known one.
    """
    check_choice("dataset", name, _SOURCES)
    return OpenmojiDataset(data_dir)


class OpenmojiDataset:
    """The OpenMoji TFDS data set, prepared into `data_dir` on first use."""

    name = "openmoji"
    credit = "OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0"
    credit_url = "https://creativecommons.org/licenses/by-sa/4.0/"

    def __init__(self, data_dir: str | os.PathLike | None = None):
        from attrib_jax.data.openmoji import Openmoji, list_emoji

        with _quiet_tfds():
            builder = Openmoji(data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
            self._source = builder.as_data_source(split="train")
            self._source[0]  # the first decoding is what warns
        rows = list_emoji()
        self.row_ids = np.arange(len(rows), dtype=np.int32)
        self.groups = np.array([row.group for row in rows], np.int32)
        self._captions = [row.captions for row in rows]
        self._codes = [row.code for row in rows]
        if len(self._source) != len(rows):
            raise ValueError(
                f"the prepared data set in {builder.data_dir} has {len(self._source)} rows, expected {len(rows)}; "
                "delete that folder to prepare it anew"
            )

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        stored = self._source[int(index)]
        if stored["code"].decode() != self._codes[index]:
            raise ValueError(
                f"row {index} of the prepared OpenMoji is {stored['code'].decode()}, expected {self._codes[index]}: it "
                "was prepared from other packages. Delete its folder, or give another --data_dir."
            )
        return Row(stored["image"], self._captions[index], int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over every picture's pixels, row id and captions."""
        return hash_rows(self)


class ArrayDataset:
    """Pictures and captions held in memory, for research code and tests."""

    credit = credit_url = None

    def __init__(
        self,
        images: np.ndarray,
        captions: Sequence[Sequence[str]],
        row_ids: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        name: str = "arrays",
    ):
        """Takes images (N, H, W, 3) uint8, one or more captions for each, row ids (0 to N - 1 if None).

        Raises:
          ValueError: shapes, dtypes or lengths do not fit, a row has no caption, or a row id comes twice.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(f"images has shape {images.shape} {images.dtype}; expected (N, H, W, 3) uint8")
        self.row_ids = np.arange(len(images), dtype=np.int32) if row_ids is None else np.asarray(row_ids, np.int32)
        if len(captions) != len(images) or not all(captions) or any(isinstance(row, str) for row in captions):
            raise ValueError(
                f"captions has {len(captions)} rows; expected {len(images)}, each a list of one or more captions"
            )
        distinct = len(np.unique(self.row_ids)) == len(images) and (self.row_ids >= 0).all()
        if self.row_ids.shape != (len(images),) or not distinct:
            raise ValueError(
                f"row_ids has shape {self.row_ids.shape}; expected ({len(images)},) distinct integers of at least 0"
            )
        if groups is not None and np.shape(groups) != self.row_ids.shape:
            raise ValueError(f"groups has shape {np.shape(groups)}; expected {self.row_ids.shape}, one for each row")
        self.name, self.groups = name, groups
        self._images, self._captions = images, [tuple(row) for row in captions]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        return Row(self._images[index], self._captions[index], int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over every picture's pixels, row id and captions."""
        return hash_rows(self)


def hash_rows(dataset: Sequence[Row]) -> str:
    """sha256 of a data set's content, in row order, by reading all of it."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        row = dataset[index]
        digest.update(repr((row.row_id, row.captions, row.image.shape)).encode())
        digest.update(np.ascontiguousarray(row.image).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_tfds():
    """TFDS logs a dozen lines and, through absl, a warning about OpenCV for each use; only errors concern a user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
