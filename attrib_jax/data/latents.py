"""Latents and text states that were encoded before: `latents:PATH`.

Either a workdir that `launch.encode` filled, or numpy files as the method's authors publish them (METHOD.md section 9):
`<name>_latents.npy` (2N, c, h, w), first N images as they are, then their mirror images, and
`<name>_text_embeddings.npy` (N, captions, tokens, width), or (N, tokens, width) where images have one caption.
"""

import abc
import glob
import os
from typing import Any

import numpy as np

from attrib_jax.core.checks import expand_path, nonfinite_rows
from attrib_jax.core.fingerprint import digest
from attrib_jax.data.protocol import Dataset, Row, named_groups
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import StorageError, read_arrays
from attrib_jax.storage.joined import JoinedArray
from attrib_jax.storage.stages import load_stage

_LATENTS, _TEXT = "_latents.npy", "_text_embeddings.npy"
_MIRRORED_COUNT = 2
# Latents times the scaling factor have a standard deviation of about 1; Stable Diffusion's without it of about 5.5.
_LARGEST_SCALED_STD = 2.5
_SAMPLED_ROWS = 256
_BLOCK, _BLOCKS = 4096, 256
# Files up to this size are read whole, to fingerprint them and to look for NaN when they are opened; of larger ones a
# sample is, and the rest is looked at when it is used.
_READ_BYTES = 2**28
# What the two latents of an image are called in messages.
VIEWS = ("the image as it is", "its mirror image")
# Beside the text states of a workdir: which rows and captions they are.
ROWS_FILE = "rows.safetensors"


class LatentsDataset(abc.ABC):
    """Encoded images and captions on disk, memory-mapped; images to show come from another data set.

    Attributes, beside those of a `Dataset`:
      latents: (R, 2, h, w, c), on disk; [:, 1] of the mirrored images.
      text: (M, L, d), on disk, of all captions of all stored images, one image after the other.
      first_caption: (R + 1,) int64; the captions of stored image r are text[first_caption[r]:first_caption[r + 1]].
      positions: (N,) where the rows lie among the R stored images.
      scaled: True if the latents are multiplied by the autoencoder's scaling factor.
      encoders: fingerprints of the autoencoder and text encoder that made them, where known.
      images: the data set whose images and captions are shown, stored image by image, or None.
      by_caption, by_image: further leaves of the conditioning, see `EncodedDataset`.
    """

    scaled: bool
    encoders: dict[str, Any] | None
    latents: Any
    text: Any
    first_caption: np.ndarray
    positions: np.ndarray

    def __init__(self, path: str | os.PathLike, images: Dataset | None, row_ids: np.ndarray, stored: int):
        if images is not None and len(images) != stored:
            raise ValueError(f"images {images.name!r} has {len(images)} images; expected the {stored} stored ones")
        self.name = f"latents:{os.fspath(path)}"
        self.row_ids, self.images = row_ids, images
        self.by_caption: dict[str, Any] = {}
        self.by_image: dict[str, Any] = {}
        self.groups = self.group_names = self.credit = self.credit_url = None
        if images is not None:
            names = named_groups(images)
            self.group_names = None if names is None else [names[place] for place in self.positions.tolist()]
            self.groups = None if images.groups is None else np.asarray(images.groups)[self.positions]
            self.credit, self.credit_url = images.credit, images.credit_url

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        """The row of `images`, with this data set's row id; LookupError where there are none to show."""
        if self.images is None:
            raise LookupError(f"{self.name} has no images; give the data set that has them as `images`")
        return self.images[int(self.positions[index])]._replace(row_id=int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions to show: those of `images`, or an empty one."""
        return ("",) if self.images is None else self.images.captions(int(self.positions[index]))

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 of what decides the rows."""


def open_latents(path: str | os.PathLike, images: Dataset | None = None, scaled: bool = True) -> LatentsDataset:
    """Opens a workdir of `launch.encode`, or the numpy files that `NumpyLatents` describes."""
    path = expand_path(path)
    if os.path.isfile(os.path.join(path, "text", ROWS_FILE)):
        if not scaled:
            raise ValueError(f"{path} was filled by launch.encode: its latents are scaled; drop scaled=False")
        return StoredLatents(path, images)
    return NumpyLatents(path, images, scaled)


class StoredLatents(LatentsDataset):
    """What `stages.encode` stored in a workdir: encoded once, read by any model with the same encoders."""

    scaled = True

    def __init__(self, workdir: str | os.PathLike, images: Dataset | None = None):
        """Raises StorageError where the stages `latents` and `text` are not finished or damaged."""
        self._stages = [load_stage(workdir, name) for name in ("latents", "text")]
        for stage in self._stages:
            if not stage.finished:
                raise StorageError(f"{stage.path} is not finished; let the command that fills it run to its end")
        arrays, header = read_arrays(self._stages[1].path / ROWS_FILE)
        self.encoders = header["encoders"]
        self.first_caption, self.positions = arrays["first_caption"], arrays["positions"]
        super().__init__(workdir, images, arrays["row_ids"], len(self.first_caption) - 1)
        self.by_image = self._open("latents", len(self.first_caption) - 1, header, "by_image")
        self.by_caption = self._open("text", int(self.first_caption[-1]), header, "by_caption")
        self.latents, self.text = self.by_image.pop("latents"), self.by_caption.pop("text")

    def _open(self, name: str, count: int, header: dict[str, Any], more: str) -> dict[str, JoinedArray]:
        (stage,) = (stage for stage in self._stages if stage.name == name)
        fields = {name: header[name], **header.get(more, {})}
        layout = {field: (tuple(shape), dtype) for field, (shape, dtype) in fields.items()}
        store = ChunkStore(stage.path, layout, count, count, name=name)
        if absent := store.pending_chunks(checked_bytes=0):
            raise StorageError(f"{store.path} lacks {len(absent)} chunks; start the command that fills it again")
        return {field: store.array(field) for field in fields}

    def fingerprint(self) -> str:
        """sha256 over the fingerprints of what was encoded, by which model, and how."""
        inputs = [stage.inputs for stage in self._stages]
        rows = [array.tobytes() for array in (self.row_ids, self.positions, self.first_caption)]
        return digest([repr(inputs), *rows])


class NumpyLatents(LatentsDataset):
    """Latents and text states as numpy files."""

    encoders = None

    def __init__(self, path: str | os.PathLike, images: Dataset | None = None, scaled: bool = True):
        """Opens `<path>_latents.npy` and `<path>_text_embeddings.npy`, or the one pair in the folder `path`.

        Args:
          path: folder, or the common beginning of the two file names.
          images: a `Dataset` of the same images in the same order, for reports, or None.
          scaled: True if the latents are multiplied by the autoencoder's scaling factor already.

        Raises:
          FileNotFoundError: no such pair, or more than one.
          ValueError: a file is damaged, of another shape, its counts do not fit the other's or `images`, or the
            latents are not scaled although `scaled` says so.
        """
        self._paths = _find_pair(os.fspath(path))
        self.scaled = scaled
        latents, text = (open_npy(file) for file in self._paths)
        if latents.ndim != 4 or latents.shape[0] % _MIRRORED_COUNT or not latents.shape[0]:
            raise ValueError(
                f"{self._paths[0]} has shape {latents.shape}; expected (2N, channels, height, width), N images and "
                "then their mirror images"
            )
        count = latents.shape[0] // _MIRRORED_COUNT
        if text.ndim not in (3, 4) or text.shape[0] != count:
            raise ValueError(
                f"{self._paths[1]} has shape {text.shape} and {self._paths[0]} {latents.shape}; expected ({count}, "
                f"captions, tokens, width) or ({count}, tokens, width) text states for {count} images and their "
                "mirror images"
            )
        # Those of LAION have one caption an image, and no axis for it.
        text = text if text.ndim == 4 else text[:, None]
        self.latents = np.moveaxis(latents.reshape(_MIRRORED_COUNT, count, *latents.shape[1:]), (0, 2), (1, 4))
        self.text = text.reshape(-1, *text.shape[2:])
        self.first_caption = np.arange(count + 1, dtype=np.int64) * text.shape[1]
        self.positions = np.arange(count)
        super().__init__(path, images, np.arange(count, dtype=np.int32), count)
        sample = np.unique(np.linspace(0, count - 1, _SAMPLED_ROWS).astype(np.int64))
        rows = sample if max(latents.nbytes, text.nbytes) > _READ_BYTES else np.arange(count)
        self._check_finite(rows, text)
        if scaled:
            self._check_scale(sample)

    def fingerprint(self) -> str:
        """sha256 over each file; of a large one over its size and 256 blocks, as reading 190 GB would take minutes."""

        def parts():
            yield repr(self.scaled)
            for path in self._paths:
                size = os.path.getsize(path)
                yield str(size)
                with open(path, "rb") as file:
                    if size <= _READ_BYTES:
                        yield from iter(lambda: file.read(2**20), b"")  # noqa: B023
                        continue
                    for start in np.linspace(0, max(size - _BLOCK, 0), _BLOCKS).astype(np.int64):
                        file.seek(int(start))
                        yield file.read(_BLOCK)

        return digest(parts())

    def _check_finite(self, rows: np.ndarray, text: np.ndarray) -> None:
        """ValueError naming the first of `rows` with NaN in its latents or its `text` (N, captions, L, d)."""
        for start in range(0, len(rows), _SAMPLED_ROWS):
            some = rows[start : start + _SAMPLED_ROWS]
            for path, values in zip(self._paths, (self.latents[some], text[some])):
                broken = nonfinite_rows(values)
                if not len(broken):
                    continue
                value = values[broken[0]]
                which = broken_views(value) if path == self._paths[0] else f"caption {nonfinite_rows(value)[0]}"
                raise ValueError(
                    f"{path}: row {some[broken[0]]} ({which}) has values that are NaN or infinite; encode that row "
                    "again, or leave it out of both files"
                )

    def _check_scale(self, rows: np.ndarray) -> None:
        std = float(np.std(np.asarray(self.latents[rows, 0], np.float64)))
        if std > _LARGEST_SCALED_STD:
            raise ValueError(
                f"the latents in {self._paths[0]} have a standard deviation of {std:.2f} (of {len(rows)} rows); about "
                "1 is expected of latents that are multiplied by the autoencoder's scaling factor. If these are not, "
                "say so with scaled=False (--nolatents_scaled)."
            )


def broken_views(latents: np.ndarray) -> str:
    """Which of an image's latents (2, h, w, c) hold NaN or infinity, in words."""
    return " and ".join(VIEWS[flip] for flip in nonfinite_rows(latents))


def _find_pair(path: str) -> tuple[str, str]:
    if not os.path.isdir(path):
        pair = (path + _LATENTS, path + _TEXT)
        absent = [file for file in pair if not os.path.isfile(file)]
        if absent:
            raise FileNotFoundError(f"latents data set {path!r}: {' and '.join(absent)} not found")
        return pair
    names = [file.removesuffix(_LATENTS) for file in sorted(glob.glob(os.path.join(glob.escape(path), f"*{_LATENTS}")))]
    names = [name for name in names if os.path.isfile(name + _TEXT)]
    if len(names) != 1:
        listed = ", ".join(map(os.path.basename, names)) or "none"
        raise FileNotFoundError(
            f"folder {path!r} has {len(names)} pairs of *{_LATENTS} and *{_TEXT} ({listed}); give the beginning of the "
            "file names, such as latents:FOLDER/coco17_train"
        )
    return names[0] + _LATENTS, names[0] + _TEXT


def open_npy(path: str | os.PathLike) -> np.ndarray:
    """Maps a numpy file of floats, read-only.

    Raises ValueError where it is damaged or truncated, or holds something else than floats (an object array would have
    to be unpickled, which is never done); FileNotFoundError where it is absent.
    """
    path = expand_path(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged or not a numpy array file ({error}); copy it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{path} holds {kind}; expected one array of floats")
    return array
