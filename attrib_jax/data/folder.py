"""`folder:PATH`: a folder of images, with captions in a metadata file, in text files beside them, or without."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from attrib_jax.data.files import ImageFiles, existing_folder, inner_path, listed_captions, warn_listed
from attrib_jax.data.images import image_suffixes

_log = logging.getLogger(__name__)
_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("text", "caption", "captions")
_SPLIT_FOLDERS = frozenset("train training test testing val valid validation dev eval evaluation".split())
_MAX_CAPTION_BYTES = 2**16
_READERS = 8


class _Entry(NamedTuple):
    """One entry of a metadata file: where it stands, for messages; the image it names; its columns."""

    source: str
    file: str
    columns: dict


def open_folder(
    path: str | os.PathLike,
    resolution: int | None = None,
    split: str | None = None,
    caption_key: str | None = None,
) -> ImageFiles:
    """Opens a folder of images, subfolders included; hidden files and folders are passed over.

    Captions come from the first of these that is there:
      - `metadata.jsonl` or `metadata.csv`, in the folder or in subfolders, as in Hugging Face's imagefolder: a column
        `file_name`, relative to the metadata file, and a caption column. The rows are the entries, in the order of the
        files' sorted paths and then of their lines; images that no entry names are left out.
      - `name.txt` beside `name.jpg`, one caption a line. The rows are the images, in the order of their sorted paths.
      - nothing: the same rows, with an empty caption.
    A warning says so where no row has a caption.

    Args:
      path: the folder. One that holds nothing but subfolders named after splits (`train`, `test`, ...) stands for its
        `train`.
      resolution: of the square that images are resized and cropped to; None leaves them as they are.
      split: name of the subfolder to take.
      caption_key: the caption column; the first of `text`, `caption`, `captions` that exists if None. In a .jsonl file
        its values may be lists.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no image, none of the files that the metadata names exists, or the metadata is damaged, lacks a
        column or names files outside of its folder.
    """
    name, root = f"folder:{path}", _split_folder(existing_folder("folder", path), path, split)
    images, texts, metadata = _list_files(root)
    if metadata:
        entries = [entry for file in metadata for entry in _read_metadata(root, file)]
        captions = _metadata_captions(entries, caption_key, metadata)
        files = [entry.file for entry in entries]
        known = set(images)
        missing = [file for file in files if file not in known and not os.path.isfile(root / file)]
        if len(missing) == len(files):
            raise ValueError(f"{name}: {metadata[0]} names {len(files)} images, and none of them exists in {root}")
        warn_listed(len(files), f"images that the metadata of {name} names do not exist", missing)
        warn_listed(len(images), f"images of {name} are not in its metadata", sorted(known.difference(files)))
        _warn_uncaptioned(name, captions)
        return ImageFiles(name, root, files, captions, resolution)
    if caption_key is not None:
        raise ValueError(f"caption_key is {caption_key!r}, but {root} has neither of {', '.join(_METADATA)}")
    if not images:
        raise ValueError(f"{name}: no image in {root}; expected files such as .png, .jpg or .webp")
    beside = [texts.get(os.path.splitext(image)[0]) for image in images]
    if any(beside):
        uncaptioned = [image for image, text in zip(images, beside) if text is None]
        warn_listed(len(images), f"images of {name} have no .txt beside them", uncaptioned)
    with ThreadPoolExecutor(_READERS) as pool:
        captions = list(pool.map(lambda text: ("",) if text is None else _read_lines(root / text), beside))
    _warn_uncaptioned(name, captions)
    return ImageFiles(name, root, images, captions, resolution)


def _warn_uncaptioned(name: str, captions: list[tuple[str, ...]]) -> None:
    if not any(caption for row in captions for caption in row):
        _log.warning(
            "%s has no captions: those of all %d rows are empty; give them as name.txt beside name.jpg, or in %s",
            *(name, len(captions), " or ".join(_METADATA)),
        )


def _split_folder(folder: Path, path, split: str | None) -> Path:
    subfolders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)}
    if split is not None:
        if split not in subfolders:
            there = ", ".join(sorted(subfolders)) or "none"
            raise ValueError(f"split is {split!r}, but there is no such subfolder in {path} (there are: {there})")
        return folder / split
    # A subfolder `train` beside others is a class of images, such as locomotives.
    alone = all(_hidden(entry.name) or entry.is_dir() or not _is_data(entry.name) for entry in folder.iterdir())
    return folder / "train" if "train" in subfolders and subfolders <= _SPLIT_FOLDERS and alone else folder


def _is_data(name: str) -> bool:
    return name in _METADATA or os.path.splitext(name)[1].lower() in image_suffixes()


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _list_files(root: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """Images, sorted; text files by their paths without .txt; metadata files, sorted: paths relative to `root`."""
    suffixes = image_suffixes()
    images, texts, metadata = [], [], []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        inner = Path(folder).relative_to(root)
        for name in names:
            path, suffix = (inner / name).as_posix(), os.path.splitext(name)[1].lower()
            if name in _METADATA:
                metadata.append(path)
            elif suffix == ".txt":
                texts.append(path)
            elif suffix in suffixes and not name.startswith("."):
                images.append(path)
    if len({os.path.basename(file) for file in metadata}) > 1:
        raise ValueError(f"{root} has both {' and '.join(_METADATA)}; keep one kind")
    # Sorted, so that of 1.TXT and 1.txt the second one is taken.
    return sorted(images), {os.path.splitext(text)[0]: text for text in sorted(texts)}, sorted(metadata)


def _read_lines(path: Path) -> tuple[str, ...]:
    """One caption a line, empty lines left out; of a file that is no caption file only the beginning is read."""
    with open(path, "rb") as file:
        text = file.read(_MAX_CAPTION_BYTES).decode("utf-8-sig", errors="replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def _read_metadata(root: Path, metadata: str) -> Iterator[_Entry]:
    path, folder = root / metadata, PurePosixPath(metadata).parent
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error
    for line, columns in (_csv_rows if metadata.endswith(".csv") else _jsonl_rows)(path, text):
        source = f"{path}, line {line}"
        if "file_name" not in columns:
            names = ", ".join(map(str, columns)) or "none"
            raise ValueError(f"{source}: no column 'file_name' (columns: {names}); expected the image's path")
        yield _Entry(source, (folder / inner_path(columns["file_name"], source)).as_posix(), columns)


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    # Not splitlines(), which also splits at separators that JSON allows within its strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(columns, dict):
            raise ValueError(f'{path}, line {number}: expected an object such as {{"file_name": "a.png", "text": "a"}}')
        yield number, columns


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns; put texts with "
                    'commas in "quotes"'
                )
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: damaged ({error})") from error


def _metadata_captions(entries: list[_Entry], key: str | None, metadata: list[str]) -> list[tuple[str, ...]]:
    if not entries:
        raise ValueError(f"{metadata[0]} has no entries")
    columns = dict.fromkeys(column for entry in entries for column in entry.columns)
    key = key or next((column for column in _CAPTION_COLUMNS if column in columns), None)
    if key not in columns:
        asked = f"column {key!r}" if key else f"caption column ({', '.join(_CAPTION_COLUMNS)})"
        raise ValueError(
            f"{metadata[0]} has no {asked}; its columns: {', '.join(columns)}. Name the one with the captions as "
            "caption_key."
        )
    return [listed_captions(entry.columns.get(key), entry.source) for entry in entries]
