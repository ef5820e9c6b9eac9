"""`folder:PATH`: a folder of images, with captions in a metadata file, in files beside them, or in folder names."""

import collections
import csv
import io
import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from attrib_jax.core.text import read_text, replace_surrogates, split_lines
from attrib_jax.data.captions import (
    CAPTION_ENDINGS,
    CAPTION_FIELDS,
    CaptionReader,
    field_captions,
    has_caption_field,
    normal_name,
    warn_uncaptioned,
)
from attrib_jax.data.files import ImageFiles, existing_folder, holds_results, inner_path, warn_listed
from attrib_jax.data.images import image_suffixes
from attrib_jax.data.protocol import NO_GROUP

_log = logging.getLogger(__name__)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
_FILE_COLUMN = "file_name"
_GROUP_COLUMN = "group"
_BESIDE = tuple(ending for ending in CAPTION_ENDINGS if ending != ".cls")
_SPLIT_FOLDERS = frozenset("train training test testing val valid validation dev eval evaluation".split())
# A folder that kohya's trainers read: how often its images are repeated, and the concept that they show.
_REPEATED_FOLDER = re.compile(r"[1-9]\d{0,2}_(\S.*)")
# Images, by what their names end in, that `decode_image` does not read; people have them among others.
_OTHER_IMAGES = frozenset(
    ".heic .heif .hif .jxl .svg .svgz .psd .xcf .eps .pdf .raw .dng .cr2 .cr3 .nef .arw .orf .raf .rw2 .exr .hdr "
    ".mp4 .mov".split()
)
_MAX_BYTES = {".json": 2**20}
_MAX_TEXT_BYTES = 2**16
_READERS = 8
_ADVICE = (
    "give them as name.txt beside name.jpg or in metadata.jsonl or metadata.csv, or name their column as caption_key"
)


class _Entry(NamedTuple):
    """One entry of a metadata file: where it stands, for messages; the image that it names; its columns."""

    source: str
    file: str
    columns: dict


class _Listing(NamedTuple):
    """What lies in a folder and its subfolders, as paths relative to it.

    Attributes:
      images: sorted.
      beside: path without its ending -> ending -> path, of files that may hold an image's caption.
      metadata: metadata files, sorted.
      others: number of further files by ending.
    """

    images: list[str]
    beside: dict[str, dict[str, str]]
    metadata: list[str]
    others: collections.Counter


def open_folder(
    path: str | os.PathLike,
    resolution: int | None = None,
    split: str | None = None,
    caption_key: str | None = None,
) -> ImageFiles:
    """Opens a folder of images, subfolders included; hidden files and folders, and results of ours, are passed over.

    The rows are the entries of the metadata files, if there are any: `metadata.jsonl`, `.csv`, `.tsv` or `.parquet`, in
    the folder or in subfolders, as in Hugging Face's imagefolder, with a column `file_name`, relative to the metadata
    file; in the order of the files' sorted paths and then of their entries. Images that no entry names are left out.
    Else the rows are the images, in the order of their sorted paths.

    A row's captions come from the first of these that has any, so that rows may differ:
      - the metadata's column `caption_key`, or the usual ones (`attrib_jax.data.captions.CAPTION_FIELDS`);
      - `name.txt` or `name.caption` beside `name.jpg`, one caption a line, or the same fields in `name.json`;
      - the name of the image's folder where that is `10_red hat`, as kohya's trainers have it: the caption is "red
        hat". An image is one row, however often it is repeated there.
    A warning counts the rows that have none.

    Groups to ask about (`Dataset.group_names`) are the metadata's column `group`; without metadata files they are the
    names of the subfolders of the folder, of several, that the images lie in. A warning counts the rows without one.

    Args:
      path: the folder. One that holds nothing but subfolders named after splits (`train`, `test`, ...) stands for its
        `train`.
      resolution: side in pixels of the square that images are resized and cropped to; None leaves them as they are.
      split: name of the subfolder to take.
      caption_key: the caption's column or field, the usual names if None. Its values may be lists.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no image, none of the files that the metadata names exists, or the metadata is damaged, lacks a
        column or names files outside of its folder.
    """
    name, root = f"folder:{path}", _split_folder(existing_folder("folder", path), path, split)
    listing = _list_files(name, root)
    entries = [entry for file in listing.metadata for entry in _read_metadata(root, file)]
    columns = dict.fromkeys(column for entry in entries for column in entry.columns)
    if listing.metadata:
        if not entries:
            raise ValueError(f"{root / listing.metadata[0]} has no entries; expected one for each image")
        files = _named_files(name, root, listing, entries)
    else:
        files = listing.images
        if not files:
            there = ", ".join(f"{count} {ending}" for ending, count in listing.others.most_common(5)) or "no files"
            raise ValueError(f"{name}: no image in {root} (there are: {there}); expected files such as .png or .jpg")
        unread = [ending for ending in listing.others if ending in _OTHER_IMAGES]
        count = sum(listing.others[ending] for ending in unread)
        if unread:
            _log.warning("%d files of %s are in formats that are not read: %s", count, name, ", ".join(sorted(unread)))
    reader = CaptionReader(caption_key)
    captions = [field_captions(entry.columns, caption_key, entry.source) for entry in entries] or [("",)] * len(files)
    _read_beside(root, files, captions, listing.beside, reader)
    if caption_key is not None:
        found = has_caption_field([*columns, *reader.fields], caption_key)
        if not found and not listing.metadata and not reader.fields:
            raise ValueError(f"caption_key is {caption_key!r}, but {root} has none of {', '.join(_METADATA)}")
    else:
        found = has_caption_field(columns, None) or any(map(any, captions)) or not listing.metadata
    if not found:
        usual = f"caption column ({', '.join(CAPTION_FIELDS[:3])}, ...)"
        asked = usual if caption_key is None else f"column {caption_key!r}"
        raise ValueError(
            f"{listing.metadata[0] if listing.metadata else root} has no {asked}; its columns: "
            f"{', '.join([*columns, *reader.fields])}. Name the one with the captions as caption_key."
        )
    reader.warn(name)
    fields = [column for column in columns if column != _FILE_COLUMN]
    fields += [f"{field} (in .json)" for field in reader.fields]
    stems = {stem for file in files for stem in (file, os.path.splitext(file)[0])}
    for stem, paths in listing.beside.items():
        fields += [ending for ending in paths if ending != ".json"] if stem in stems else paths.values()
    fields += [f"{ending} files" for ending in listing.others if ending in (".jsonl", ".csv", ".parquet", ".tsv")]
    warn_uncaptioned(name, captions, files, fields, _ADVICE)
    groups = _metadata_groups(name, entries) if listing.metadata else _folder_groups(name, files)
    return ImageFiles(name, root, files, captions, resolution, group_names=groups)


def _named_files(name: str, root: Path, listing: _Listing, entries: list[_Entry]) -> list[str]:
    """The entries' images as they lie in the folder, where Unicode may write the same name in two ways."""
    known = set(listing.images)
    normal = {unicodedata.normalize("NFC", image): image for image in listing.images}
    files = [entry.file if entry.file in known else normal.get(_nfc(entry.file), entry.file) for entry in entries]
    missing = [file for file in files if file not in known and not os.path.isfile(root / file)]
    if len(missing) == len(files):
        raise ValueError(f"{name}: {listing.metadata[0]} names {len(files)} images, and none of them exists in {root}")
    warn_listed(len(files), f"images that the metadata of {name} names do not exist", missing)
    unlisted = sorted(known.difference(files))
    warn_listed(len(listing.images), f"images of {name} are not in its metadata and are left out", unlisted)
    return files


def _metadata_groups(name: str, entries: list[_Entry]) -> list[str] | None:
    """Each row's entry in the column `group`; None where there is no such column.

    Raises ValueError for an entry that is neither text nor a whole number.
    """
    found = []
    for entry in entries:
        column = next((name for name in entry.columns if normal_name(name) == _GROUP_COLUMN), None)
        value = None if column is None else entry.columns[column]
        if isinstance(value, float) and math.isnan(value):  # how tables mark a cell without a value
            value = None
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{entry.source}: group is {value!r}; expected a text, such as the image's artist")
        found.append((column, replace_surrogates(str(value)).strip() if value is not None else ""))
    if all(column is None for column, _ in found):
        return None
    return _named_groups(name, [group for _, group in found], [entry.file for entry in entries])


def _folder_groups(name: str, files: list[str]) -> list[str] | None:
    """The subfolder that each image lies in, of the folder itself; None where fewer than two hold images.

    That of a folder such as `10_red hat` is "red hat", as its caption.
    """
    folders = [PurePosixPath(file).parts[0] if "/" in file else "" for file in files]
    groups = [match[1] if (match := _REPEATED_FOLDER.fullmatch(folder)) else folder for folder in folders]
    return _named_groups(name, groups, files) if len({*groups} - {""}) > 1 else None


def _named_groups(name: str, groups: list[str], files: list[str]) -> list[str]:
    without = [file for file, group in zip(files, groups) if not group]
    warn_listed(len(files), f"images of {name} have no group and count as {NO_GROUP!r}", without)
    return [group or NO_GROUP for group in groups]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _read_beside(root: Path, files: list[str], captions: list, beside: dict, reader: CaptionReader) -> None:
    """Gives rows without a caption what lies beside their images or, failing that, in their folder's name."""
    without = [row for row, texts in enumerate(captions) if not any(texts)]

    def read(row: int) -> list[tuple[str, str, bytes]]:
        """(ending, path, content) of the files beside an image, by name.txt or name.jpg.txt."""
        there = beside.get(files[row], {}) | beside.get(os.path.splitext(files[row])[0], {})
        contents = []
        for ending in _BESIDE if reader.key is None else (".json",):
            if ending in there:
                with open(root / there[ending], "rb") as file:
                    contents.append((ending, there[ending], file.read(_MAX_BYTES.get(ending, _MAX_TEXT_BYTES))))
        return contents

    repeated = []
    with ThreadPoolExecutor(_READERS) as pool:
        for row, contents in zip(without, pool.map(read, without)):
            for ending, path, content in contents:
                cut = len(content) == _MAX_TEXT_BYTES
                captions[row] = reader.captions(content, ending, path, lines=True, cut=cut)
                if any(captions[row]):
                    break
            folder = _REPEATED_FOLDER.fullmatch(PurePosixPath(files[row]).parent.name or root.name)
            if folder and reader.key is None and not any(captions[row]):
                captions[row] = (folder[1],)
                repeated.append(files[row])
    what = "images have the caption in their folder's name, such as `10_red hat`; each is one row, not repeated"
    warn_listed(len(files), what, repeated)


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
    return name.lower() in _METADATA or os.path.splitext(name)[1].lower() in image_suffixes()


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _list_files(name: str, root: Path) -> _Listing:
    suffixes = image_suffixes()
    images, metadata, beside = [], [], []
    others: collections.Counter[str] = collections.Counter()
    results: list = []
    for inner, names in _walk(root, results):
        for file in names:
            path, ending = (inner / file).as_posix(), os.path.splitext(file)[1].lower()
            if file.lower() in _METADATA:
                metadata.append(path)
            elif ending in _BESIDE:
                beside.append((path, ending))
            elif file.startswith("."):
                continue
            elif ending in suffixes:
                images.append(path)
            else:
                others[ending or "without ending"] += 1
    if results:
        _log.warning(
            "%d folders of %s hold results (stage.json) and are left out: %s", len(results), name, ", ".join(results)
        )
    kinds = sorted({os.path.basename(file).lower() for file in metadata})
    if len(kinds) > 1:
        raise ValueError(f"{root} has both {' and '.join(kinds)}; keep one kind")
    by_stem: dict[str, dict[str, str]] = {}
    # Sorted, so that of 1.TXT and 1.txt the second one is taken.
    for path, ending in sorted(beside):
        by_stem.setdefault(os.path.splitext(path)[0], {})[ending] = path
    return _Listing(sorted(images), by_stem, sorted(metadata), others)


def _walk(root: Path, results: list[str]) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Each folder's path relative to `root` and its files; those that hold results are added to `results` instead.

    Links to folders are followed, but for those that would lead in a circle or to what is found elsewhere.
    """
    whole = os.path.realpath(root)
    seen = {whole}
    waiting = [root]
    while waiting:
        start = waiting.pop()
        for folder, subfolders, names in os.walk(start, onerror=_warn_unread):
            inner = PurePosixPath(Path(folder).relative_to(root).as_posix())
            if holds_results(folder):
                results.append(inner.as_posix())
                subfolders.clear()
                continue
            subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
            for name in subfolders:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    continue
                target = os.path.realpath(path)
                if not _within(whole, target) and not any(_within(target, other) for other in seen):
                    seen.add(target)
                    waiting.append(Path(path))
            yield inner, names


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _warn_unread(error: OSError) -> None:
    _log.warning("folder %s cannot be read and is left out (%s)", error.filename, error.strerror)


def _read_metadata(root: Path, metadata: str) -> Iterator[_Entry]:
    path, folder = root / metadata, PurePosixPath(metadata).parent
    rows = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _csv_rows)
    for line, columns in rows(path):
        source = f"{path}, line {line}"
        file = next((name for name in columns if str(name).strip().lower() == _FILE_COLUMN), None)
        if file is None:
            names = ", ".join(map(str, columns)) or "none"
            raise ValueError(f"{source}: no column {_FILE_COLUMN!r} (columns: {names}); expected the image's path")
        rest = {name: value for name, value in columns.items() if name != file}
        yield _Entry(source, (folder / inner_path(columns[file], source)).as_posix(), {_FILE_COLUMN: None} | rest)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(split_lines(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(columns, dict):
            raise ValueError(f'{path}, line {number}: expected an object such as {{"file_name": "a.png", "text": "a"}}')
        yield number, columns


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    text = read_text(path)
    first = (split_lines(text) or [""])[0]
    # Spreadsheets write what their country's settings say.
    delimiter = next((mark for mark in ",;\t" if _FILE_COLUMN in _header(first, mark)), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header and _FILE_COLUMN not in map(str.lower, header):
            raise ValueError(
                f"{path}, line 1: no column {_FILE_COLUMN!r} (columns: {', '.join(header)}); expected a header such as "
                "file_name,text"
            )
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


def _header(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"').strip().lower() for name in line.split(delimiter)]


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    def is_text(kind) -> bool:
        inner = kind.value_type if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) else kind
        return pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner)

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            # What else there is may be images or embeddings, too large to hold; names are enough for messages.
            texts = [field.name for field in schema if is_text(field.type)]
            batches = file.iter_batches(columns=texts)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, columns in enumerate(rows, 1):
                yield number, {field.name: columns.get(field.name) for field in schema}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file ({error})") from error
