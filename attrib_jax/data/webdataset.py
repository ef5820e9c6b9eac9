"""`webdataset:PATH`: images and captions in tar shards, as img2dataset writes them for LAION."""

import contextlib
import glob
import json
import logging
import os
import re
from collections.abc import Iterator

import numpy as np

from attrib_jax.data.files import listed_captions, warn_listed
from attrib_jax.data.images import MAX_FILE_BYTES, UnreadableRowError, decode_image, fit_image, image_suffixes
from attrib_jax.data.protocol import FilePart, Row, hash_files
from attrib_jax.data.tar_index import index_tar

_log = logging.getLogger(__name__)
_CAPTION_FIELD = "caption"
_MAX_CAPTION_BYTES = 2**20
_ABSENT = -1
_IMAGE, _TEXT, _JSON = range(3)


class WebDataset:
    """Random access to tar shards: their headers are read once, a row's bytes whenever it is asked for.

    A row is what shares a name up to the first dot after the last '/': `<key>.jpg`, `<key>.txt`, `<key>.json`; a
    image with a further dot in its name, such as `<key>.v2.jpg`, is left out and counted in a warning. Rows are
    numbered through the shards, which are sorted by name, in the order in which their keys are stored. A shard that is
    damaged or cut off keeps the rows before the damage, so the rows after it have other ids than they would have in a
    whole copy.
    """

    groups = credit = credit_url = None

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
    ):
        """Opens the shards.

        Args:
          path: folder of .tar files, one .tar file, or a pattern such as `laion/{00000..00011}.tar` or `laion/*.tar`.
          resolution: of the square that images are resized and cropped to; None leaves them as they are.
          image_key: ending of the image's name, such as `jpg`; any that Pillow reads if None.
          caption_key: field of the .json with the caption or the list of captions; if None, the .txt has the caption,
            and where there is none the field `caption`.

        Raises:
          FileNotFoundError: no shard, or one that the pattern names is missing.
          ValueError: no shard has an image, or no .json has the field `caption_key`.
        """
        self.name = f"webdataset:{path}"
        self._shards = _find_shards(self.name, os.path.expanduser(os.fspath(path)))
        self._resolution, self._caption_key = resolution, caption_key
        suffixes = image_suffixes() if image_key is None else {"." + image_key.lower().lstrip(".")}
        self._keys: list[str] = []
        places: list[tuple] = []
        damaged, left_out, dotted = [], [], []
        for number, shard in enumerate(self._shards):
            index = index_tar(shard)
            rows, unused, further_dots = _group(index.members, suffixes)
            if index.damage is not None:
                _drop_incomplete(rows)
                damaged.append(f"{shard} (after {len(rows)} rows: {index.damage})")
            left_out += [f"{shard}: {name}" for name in unused]
            dotted += [f"{shard}: {name}" for name in further_dots]
            for key, parts in rows.items():
                self._keys.append(key)
                places.append((number, *((p.offset, p.size) if p else (_ABSENT, _ABSENT) for p in parts)))
        if not places:
            reason = f"; {damaged[0]}" if damaged else ""
            if dotted:
                reason += (
                    f"; endings begin at a name's first dot, which leaves out {dotted[0]}: name images without "
                    "further dots, or give the whole ending, such as 'v2.jpg', as image_key"
                )
            raise ValueError(f"{self.name}: no image in {len(self._shards)} shards{reason}")
        warn_listed(len(self._shards), f"shards of {self.name} are damaged, and what follows is left out", damaged)
        left_out += dotted
        what = f"names in {self.name} have no image, come twice or have a further dot, and are left out"
        warn_listed(len(places) + len(left_out), what, left_out)
        self._shard = np.array([place[0] for place in places], np.int32)
        self._places = np.array([place[1:] for place in places], np.int64)  # (N, image or text or json, offset, size)
        self.row_ids = np.arange(len(places), dtype=np.int32)
        if caption_key is not None:
            self._check_caption_key(caption_key)

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        name = f"{self._keys[index]} in {self._shards[self._shard[index]]}"
        image = fit_image(decode_image(self._read(index, _IMAGE), name), self._resolution)
        return Row(image, self.captions(index), int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """From the .txt or the .json; a .json that is damaged gives an empty caption and a warning."""
        if self._caption_key is None and self._part(index, _TEXT) is not None:
            return (self._read(index, _TEXT, _MAX_CAPTION_BYTES).decode("utf-8", errors="replace").strip(),)
        if self._part(index, _JSON) is None:
            return ("",)
        source = f"{self._keys[index]}.json in {self._shards[self._shard[index]]}"
        try:
            return listed_captions(self._fields(index).get(self._caption_key or _CAPTION_FIELD), source)
        except (ValueError, RecursionError) as error:
            _log.warning("no caption for row %d: %s is damaged (%s)", self.row_ids[index], source, error)
            return ("",)

    def fingerprint(self) -> str:
        """sha256 over resolution, shard names, keys, captions, and size and ends of each image; see `hash_files`."""
        rows = ((int(self._shard[index]), key, self.captions(index)) for index, key in enumerate(self._keys))
        described = [self._resolution, [os.path.basename(shard) for shard in self._shards]]
        images = [self._part(index, _IMAGE) for index in range(len(self))]
        return hash_files((item for items in (described, rows) for item in items), images)

    def _check_caption_key(self, key: str) -> None:
        """ValueError unless the .json of some row has the field; the first one mostly has it, so that few are read."""
        there: dict[str, None] = {}
        for index in np.flatnonzero(self._places[:, _JSON, 0] != _ABSENT):
            with contextlib.suppress(ValueError, RecursionError):  # `captions` reports a damaged one
                fields = self._fields(index)
                if key in fields:
                    return
                there |= dict.fromkeys(fields)
        raise ValueError(
            f"{self.name}: no .json has a field {key!r}; their fields: {', '.join(there) or 'none'}. Name the one with "
            "the captions as caption_key."
        )

    def _fields(self, index: int) -> dict:
        """What a row's .json holds; ValueError or RecursionError for one that is damaged."""
        fields = json.loads(self._read(index, _JSON, _MAX_CAPTION_BYTES))
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
        return fields

    def _part(self, index: int, which: int) -> FilePart | None:
        offset, size = map(int, self._places[index, which])
        return None if offset == _ABSENT else FilePart(self._shards[self._shard[index]], offset, size)

    def _read(self, index: int, which: int, limit: int | None = None) -> bytes:
        part, name = self._part(index, which), f"{self._keys[index]} in {self._shards[self._shard[index]]}"
        size = part.size if limit is None else min(part.size, limit)
        if size > MAX_FILE_BYTES:
            raise UnreadableRowError(f"image {name} has {size} bytes; at most {MAX_FILE_BYTES} are read")
        # Opened for each read: data sets of 40,000 shards exist, and a process may not hold that many open.
        with open(part.path, "rb") as file:
            file.seek(part.offset)
            content = file.read(size)
        if len(content) != size:
            raise UnreadableRowError(f"{name}: the file is shorter than when it was opened")
        return content


def _group(members, suffixes) -> tuple[dict[str, list[FilePart | None]], list[str], list[str]]:
    """Parts by key: [image, text, json], in stored order; the names that make no row; images with further dots."""
    rows: dict[str, list[FilePart | None]] = {}
    unused, dotted, endings = [], [], tuple(suffixes)
    for name, part in members:
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = (dot + suffix).lower()
        which = {".txt": _TEXT, ".json": _JSON}.get(suffix, _IMAGE if suffix in suffixes else None)
        if not stem:
            continue
        if which is None:
            if suffix.endswith(endings):
                dotted.append(name)
            continue
        parts = rows.setdefault(folder + slash + stem, [None, None, None])
        if parts[which] is None:
            parts[which] = part
        else:
            unused.append(name)
    without = [key for key, parts in rows.items() if parts[_IMAGE] is None]
    return {key: parts for key, parts in rows.items() if parts[_IMAGE] is not None}, unused + without, dotted


def _drop_incomplete(rows: dict[str, list[FilePart | None]]) -> None:
    """Removes the last row of a shard that was cut between its image and its caption."""
    if not rows:
        return
    first, last = next(iter(rows.values())), next(reversed(rows.values()))
    if last[_TEXT:] == [None, None] or any(usual and not part for usual, part in zip(first, last)):
        rows.popitem()


def _find_shards(name: str, path: str) -> list[str]:
    if os.path.isdir(path):
        shards = [os.path.join(path, file) for file in os.listdir(path) if file.endswith(".tar")]
    else:
        shards = []
        for pattern in _expand(path):
            found = [pattern] if os.path.isfile(pattern) else [f for f in glob.glob(pattern) if os.path.isfile(f)]
            if not found:
                raise FileNotFoundError(f"{name}: {pattern!r} does not exist; expected .tar shards")
            shards += found
    if not shards:
        raise FileNotFoundError(f"{name}: no .tar file in {path!r}; expected shards such as 00000.tar")
    return sorted(set(shards))


def _expand(pattern: str) -> Iterator[str]:
    """'{00..02}.tar' -> '00.tar', '01.tar', '02.tar'; '{a,b}' likewise."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None or os.path.exists(pattern):
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if bounds:
        choices = (f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1))
    else:
        choices = iter(braces[1].split(","))
    for choice in choices:
        yield from _expand(pattern[: braces.start()] + choice + pattern[braces.end() :])
