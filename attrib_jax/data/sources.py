"""`open_dataset`, and the data sets that need no files of the user's: OpenMoji, digits, and arrays in memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.core.checks import check_choice, check_positive, expand_path
from attrib_jax.data.images import fit_image
from attrib_jax.data.protocol import Dataset, Row, hash_rows

__all__ = ["ArrayDataset", "Dataset", "OpenmojiDataset", "Row", "hash_rows", "open_dataset"]

# Kinds of data sets, and which further arguments of `open_dataset` each takes.
_KINDS = {
    "openmoji": (),
    "tfds": ("split", "image_key", "caption_key"),
    "folder": ("split", "caption_key"),
    "coco": ("split",),
    "webdataset": ("image_key", "caption_key"),
    "latents": (),
    "digits": (),
}


def open_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    resolution: int | None = None,
    split: str | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> Dataset:
    """Opens, and for `openmoji` on first use prepares, a data set.

    Args:
      name: `openmoji`, `digits`, `tfds:NAME[:SPLIT]`, `folder:PATH`, `coco:PATH`, `webdataset:PATH` or `latents:PATH`;
        see `DigitsDataset`, `TfdsDataset`, `open_folder`, `open_coco`, `WebDataset` and `open_latents`.
      data_dir: folder of prepared data sets; TFDS's own default (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`) if
        None.
      resolution: side in pixels of the square that images are resized and cropped to; None leaves them as they are.
      split: split of a `tfds`, `folder` or `coco` data set.
      image_key: the image feature of `tfds`, or the ending of images' names in `webdataset`.
      caption_key: the caption's feature, column or field, of `tfds`, `folder` and `webdataset`.

    Raises:
      ValueError: an unknown name; the message suggests the nearest known one. Or an argument that this kind of data set
        does not take, or data that is damaged.
      FileNotFoundError: nothing is there.
    """
    kind, colon, place = name.partition(":")
    check_choice("dataset", kind, _KINDS)
    whole = kind in ("openmoji", "digits")
    if not whole and not place:
        raise ValueError(f"dataset {name!r} names no place; expected {kind}:{'NAME' if kind == 'tfds' else 'PATH'}")
    if whole and colon:
        raise ValueError(f"dataset is {name!r}; expected {kind}, which has no parts")
    if resolution is not None:
        check_positive("resolution", resolution, integer=True)
    given = {"split": split, "image_key": image_key, "caption_key": caption_key}
    for argument, value in given.items():
        if value is not None and argument not in _KINDS[kind]:
            raise ValueError(f"{argument} is {value!r}, which {kind} data sets do not take; leave it out")
    # Each kind's module and what it needs are loaded where that kind is opened.
    if kind == "digits":
        from attrib_jax.data.digits import RESOLUTION, DigitsDataset

        if resolution not in (None, RESOLUTION):
            raise ValueError(f"resolution is {resolution}; digits have {RESOLUTION} pixels a side")
        return DigitsDataset()
    if kind == "tfds":
        from attrib_jax.data.tfds_source import TfdsDataset

        return TfdsDataset(place, data_dir, resolution, split, image_key, caption_key)
    if kind == "folder":
        from attrib_jax.data.folder import open_folder

        return open_folder(place, resolution, split, caption_key)
    if kind == "coco":
        from attrib_jax.data.coco import open_coco

        return open_coco(place, resolution, split)
    if kind == "webdataset":
        from attrib_jax.data.webdataset import WebDataset

        return WebDataset(place, resolution, image_key, caption_key)
    if kind == "latents":
        from attrib_jax.data.latents import open_latents

        return open_latents(place)
    return OpenmojiDataset(data_dir, resolution)


def check_separate(workdir: str | os.PathLike, dataset: str) -> None:
    """Raises ValueError where results would lie among a data set's images, or its images among results.

    Images of results, such as `query.png`, would be scored as training images by the next run. Links are resolved.

    Args:
      workdir: folder that results are written to; it need not exist.
      dataset: name of a data set, as for `open_dataset`; only folders of images can be in the way.
    """
    kind, _, place = dataset.partition(":")
    if kind not in ("folder", "coco", "webdataset") or not place or not os.path.isdir(expand_path(place)):
        return
    mine, theirs = (Path(expand_path(path)).resolve() for path in (workdir, place))
    for inner, outer, what in ((mine, theirs, "lies within"), (theirs, mine, "contains")):
        # By identity, since on some disks names in other letters are the same folder.
        if any(parent.exists() and outer.exists() and parent.samefile(outer) for parent in (inner, *inner.parents)):
            raise ValueError(
                f"workdir is {os.fspath(workdir)!r}, which {what} the folder of dataset {dataset!r}: images among "
                "results would be scored as training images. Give a workdir outside of that folder, such as runs/one."
            )


class OpenmojiDataset:
    """The OpenMoji TFDS data set, prepared into `data_dir` on first use."""

    name = "openmoji"
    group_names = None  # the packages tell of skin-tone variants alone, which are `groups`
    credit = "OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0"
    credit_url = "https://creativecommons.org/licenses/by-sa/4.0/"

    def __init__(self, data_dir: str | os.PathLike | None = None, resolution: int | None = None):
        """Images have 64 x 64 pixels, or are resized where `resolution` is another number."""
        from attrib_jax.data.openmoji import Openmoji, list_emoji
        from attrib_jax.data.tfds_source import quiet_tfds

        with quiet_tfds():
            place = None if data_dir is None else expand_path(data_dir)
            builder = Openmoji(data_dir=place, file_format="array_record")
            builder.download_and_prepare()
        self._builder_dir, self._resolution = os.fspath(builder.data_dir), resolution
        self._source: Any = None
        rows = list_emoji()
        self.row_ids = np.arange(len(rows), dtype=np.int32)
        self.groups = np.array([row.group for row in rows], np.int32)
        self._captions = [row.captions for row in rows]
        self._codes = [row.code for row in rows]
        self._ensure_open()
        if len(self._source) != len(rows):
            raise ValueError(
                f"the prepared data set in {self._builder_dir} has {len(self._source)} rows, expected {len(rows)}; "
                "delete that folder to prepare it again"
            )

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        self._ensure_open()
        stored = self._source[int(index)]
        if stored["code"].decode() != self._codes[index]:
            raise ValueError(
                f"row {index} of the prepared OpenMoji is {stored['code'].decode()}, expected {self._codes[index]}: it "
                "was prepared from other packages. Delete its folder, or give another --data_dir."
            )
        image = fit_image(stored["image"], self._resolution)
        return Row(image, self._captions[index], int(self.row_ids[index]), stored["image"].shape[:2])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over every image's pixels, row id and captions."""
        return hash_rows(self)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def _ensure_open(self) -> None:
        if self._source is not None:
            return
        from tensorflow_datasets.core.read_only_builder import builder_from_directory

        from attrib_jax.data.tfds_source import quiet_tfds

        with quiet_tfds():
            source = builder_from_directory(self._builder_dir).as_data_source(split="train")
            source[0]  # the first decoding is what warns
        self._source = source


class ArrayDataset:
    """Images and captions held in memory, for research code and tests."""

    credit = credit_url = None

    def __init__(
        self,
        images: np.ndarray,
        captions: Sequence[Sequence[str]],
        row_ids: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        name: str = "arrays",
        group_names: Sequence[str] | None = None,
    ):
        """Takes images (N, H, W, 3) uint8, one or more captions for each, row ids (0 to N - 1 if None).

        `groups` are near-duplicates and `group_names` what a user asks about, see `Dataset`.

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
        if group_names is not None and (isinstance(group_names, str) or len(group_names) != len(images)):
            raise ValueError(f"group_names has {len(group_names)} entries; expected {len(images)}, one for each row")
        self.name, self.groups = name, groups
        self.group_names = None if group_names is None else list(group_names)
        self._images, self._captions = images, [tuple(row) for row in captions]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        return Row(self._images[index], self._captions[index], int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over every image's pixels, row id and captions."""
        return hash_rows(self)
