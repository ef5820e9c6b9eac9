"""Images that lie in files of their own: what `folder:` and `coco:` share."""

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from attrib_jax.core.checks import expand_path
from attrib_jax.data.images import decode_image, fit_image
from attrib_jax.data.protocol import FilePart, Row, hash_files

_log = logging.getLogger(__name__)
SHOWN = 5  # names in a warning


class ImageFiles:
    """Image files under one folder, with their captions in memory."""

    groups = None
    counts_captions = True

    def __init__(
        self,
        name: str,
        folder: str | os.PathLike,
        files: Sequence[str],
        captions: Sequence[tuple[str, ...]],
        resolution: int | None,
        credit: str | None = None,
        credit_url: str | None = None,
        group_names: Sequence[str] | None = None,
    ):
        """Takes the images' paths relative to `folder`, with '/', in row order; row ids are their positions."""
        self.group_names = group_names
        self.name, self.credit, self.credit_url = name, credit, credit_url
        self.row_ids = np.arange(len(files), dtype=np.int32)
        self._folder, self._files, self._captions = os.fspath(folder), list(files), list(captions)
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        image = decode_image(self._path(index))
        fitted = fit_image(image, self._resolution)
        return Row(fitted, self._captions[index], int(self.row_ids[index]), image.shape[:2])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over resolution, file names, captions, and what `hash_files` reads of each file."""
        rows = zip(self.row_ids.tolist(), self._files, self._captions)
        return hash_files([self._resolution, *rows], [FilePart(self._path(index)) for index in range(len(self))])

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])


def inner_path(name: object, source: str) -> str:
    """A file name from a list that someone else wrote, relative to its folder -> the same with '/', normalized.

    Raises ValueError, naming `source`, for anything that is not a name or leads out of the folder.
    """
    # Windows rules on every system, so that a list means the same files everywhere.
    path = PureWindowsPath(name if isinstance(name, str) else "")
    # JSON can escape what no file name may hold: NUL, and halves of a character.
    if not path.name or path.anchor or ".." in path.parts or re.search("[\0\ud800-\udfff]", str(name)):
        raise ValueError(f"{source}: file name {name!r}; expected a path inside the folder, without '..'")
    return PurePosixPath(*path.parts).as_posix()


def printable(name: str) -> str:
    """A file name as it can be shown in one line."""
    return name if name.isprintable() else repr(name)


def warn_listed(count: int, what: str, names: Sequence[str]) -> None:
    """Logs a warning that some of `count` are `what`, with the first few names; nothing where there are none."""
    if names:
        more = ", ..." if len(names) > SHOWN else ""
        shown = ", ".join(map(printable, names[:SHOWN]))
        _log.warning("%d of %d %s: %s%s", len(names), count, what, shown, more)


def holds_results(folder: str | os.PathLike) -> bool:
    """Whether a folder is a workdir or stage of ours: its images are queries and reports, not training images."""
    for record in ("stage.json", os.path.join("inputs", "stage.json")):
        try:
            with open(os.path.join(folder, record), encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and {"stage", "settings", "inputs"} <= content.keys():
            return True
    return False


def existing_folder(kind: str, path: str | os.PathLike) -> Path:
    """`path` with ~ expanded; FileNotFoundError unless it is a folder."""
    folder = Path(expand_path(path))
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"dataset {kind}:{path}: {str(folder)!r} {what}; expected a folder")
    return folder
