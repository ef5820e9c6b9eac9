"""`webdataset:PATH`: images and captions in tar shards, as img2dataset writes them for LAION."""

import glob
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from attrib_jax.core.checks import expand_path
from attrib_jax.data.captions import CAPTION_ENDINGS, CaptionReader, has_caption_field, warn_uncaptioned
from attrib_jax.data.files import holds_results, warn_listed
from attrib_jax.data.images import MAX_FILE_BYTES, UnreadableRowError, decode_image, fit_image, image_suffixes
from attrib_jax.data.protocol import FilePart, Row, hash_files
from attrib_jax.data.tar_index import index_tar

_MAX_CAPTION_BYTES = 2**20
_READERS = 8
_IMAGE = "image"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_ADVICE = "expected key.txt, key.caption or a field of key.json beside key.jpg; name the field as caption_key"


class _Shard(NamedTuple):
    """What one tar file holds.

    Attributes:
      path: path of the file.
      keys: keys of its N rows, in stored order.
      places: (N, 2) int64, offset and size of each row's image.
      captions: captions of each row.
      endings: endings of the names of members that are not images.
      reader: counts of what was odd about the captions.
      unused: names that make no row.
      dotted: images that further dots in their names leave out.
      damage: damage of the file after its last row, or None.
    """

    path: str
    keys: list[str]
    places: np.ndarray
    captions: list[tuple[str, ...]]
    endings: dict[str, None]
    reader: CaptionReader
    unused: list[str]
    dotted: list[str]
    damage: str | None


class WebDataset:
    """Random access to tar shards: headers and captions are read once, an image whenever its row is read.

    A row is what shares a name up to the first dot after the last '/': `<key>.jpg`, `<key>.txt`, `<key>.json`; an
    image with a further dot in its name, such as `<key>.v2.jpg`, is left out and counted in a warning. Rows are
    numbered through the shards, which are sorted by name, in the order in which their keys are stored. A shard that is
    damaged or cut off keeps the rows before the damage, so the rows after it have other ids than they would have in a
    whole copy.
    """

    groups = group_names = credit = credit_url = None
    counts_captions = True

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
          resolution: side in pixels of the square that images are resized and cropped to; None leaves them as they are.
          image_key: ending of the image's name, such as `jpg`; any that Pillow reads if None.
          caption_key: field of the .json with the caption or the list of captions; if None, the caption is that of the
            .txt, the .caption, a usual field of the .json or the .cls, the first that has one.

        Raises:
          FileNotFoundError: no shard, or one that the pattern names is missing.
          ValueError: no shard has an image, or no .json has the field `caption_key`.
        """
        self.name = f"webdataset:{path}"
        self._resolution = resolution
        suffixes = image_suffixes() if image_key is None else {"." + image_key.lower().lstrip(".")}
        paths = _find_shards(self.name, expand_path(path))
        usual = _usual_parts(paths, suffixes)
        with ThreadPoolExecutor(_READERS) as pool:
            shards = list(pool.map(lambda shard: _read_shard(shard, suffixes, caption_key, usual), paths))
        self._shards = paths
        self._keys = [key for shard in shards for key in shard.keys]
        _warn_left_out(self.name, shards, len(self._keys))
        self._captions = [captions for shard in shards for captions in shard.captions]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.keys) for shard in shards])
        self._places = np.concatenate([shard.places for shard in shards])
        self.row_ids = np.arange(len(self._keys), dtype=np.int32)
        reader = CaptionReader(caption_key)
        for shard in shards:
            reader.merge(shard.reader)
        if caption_key is not None and not has_caption_field(reader.fields, caption_key):
            raise ValueError(
                f"{self.name}: no .json has a field {caption_key!r}; their fields: "
                f"{', '.join(reader.fields) or 'none'}. Name the one with the captions as caption_key."
            )
        reader.warn(self.name)
        fields = [ending for shard in shards for ending in shard.endings if ending != ".json"]
        fields += [f"{field} (in .json)" for field in reader.fields]
        warn_uncaptioned(self.name, self._captions, self._keys, fields, _ADVICE)

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        part, name = self._part(index), f"{self._keys[index]} in {self._shards[self._shard[index]]}"
        if part.size > MAX_FILE_BYTES:
            raise UnreadableRowError(f"image {name} has {part.size} bytes; at most {MAX_FILE_BYTES} are read")
        # Opened for each read: data sets of 40,000 shards exist, and a process may not hold that many open.
        with open(part.path, "rb") as file:
            file.seek(part.offset)
            content = file.read(part.size)
        if len(content) != part.size:
            raise UnreadableRowError(f"{name}: the file is shorter than when it was opened")
        image = decode_image(content, name)
        fitted = fit_image(image, self._resolution)
        return Row(fitted, self.captions(index), int(self.row_ids[index]), image.shape[:2])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def fingerprint(self) -> str:
        """sha256 over resolution, shard names, keys, captions, and what `hash_files` reads of each image."""
        rows = zip(self._shard.tolist(), self._keys, self._captions)
        described = [self._resolution, [os.path.basename(shard) for shard in self._shards]]
        images = [self._part(index) for index in range(len(self))]
        return hash_files((item for items in (described, rows) for item in items), images)

    def _part(self, index: int) -> FilePart:
        offset, size = map(int, self._places[index])
        return FilePart(self._shards[self._shard[index]], offset, size)


class _Rows(NamedTuple):
    """A tar file's rows, key -> ending or "image" -> part, in stored order; for the rest see `_Shard`."""

    rows: dict[str, dict[str, FilePart]]
    endings: dict[str, None]
    unused: list[str]
    dotted: list[str]
    damage: str | None


def _group(path: str, suffixes) -> _Rows:
    index = index_tar(path)
    rows: dict[str, dict[str, FilePart]] = {}
    unused, dotted, image_endings = [], [], tuple(suffixes)
    endings: dict = {}
    for name, part in index.members:
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = (dot + suffix).lower()
        if not stem:
            continue
        which = suffix if suffix in CAPTION_ENDINGS else _IMAGE if suffix in suffixes else None
        if which != _IMAGE:
            endings[suffix] = None
        if which is None:
            if suffix.endswith(image_endings):
                dotted.append(name)
        elif rows.setdefault(folder + slash + stem, {}).setdefault(which, part) is not part:
            unused.append(name)
    unused += [key for key, parts in rows.items() if _IMAGE not in parts]
    whole = {key: parts for key, parts in rows.items() if _IMAGE in parts}
    return _Rows(whole, endings, unused, dotted, index.damage)


def _usual_parts(paths: list[str], suffixes) -> set[str]:
    """The endings that the first row of the first whole shard has; none where no shard is whole."""
    for path in paths:
        found = _group(path, suffixes)
        if found.damage is None and found.rows:
            return set(next(iter(found.rows.values())))
    return set()


def _read_shard(path: str, suffixes, caption_key: str | None, usual: set[str]) -> _Shard:
    rows, endings, unused, dotted, damage = _group(path, suffixes)
    if damage is not None and rows:
        # The last row of a file that was cut off may lack its caption.
        last = next(reversed(rows.values()))
        usual = usual or set(next(iter(rows.values())))
        if not usual <= last.keys() or last.keys() == {_IMAGE}:
            rows.popitem()
    reader, captions = CaptionReader(caption_key), []
    with open(path, "rb") as file:
        for key, parts in rows.items():
            texts: tuple[str, ...] = ("",)
            for ending in CAPTION_ENDINGS if caption_key is None else (".json",):
                if ending in parts and not any(texts):
                    file.seek(parts[ending].offset)
                    size = min(parts[ending].size, _MAX_CAPTION_BYTES)
                    name = f"{key}{ending} in {path}"
                    texts = reader.captions(file.read(size), ending, name, cut=size < parts[ending].size)
            captions.append(texts)
    places = [(parts[_IMAGE].offset, parts[_IMAGE].size) for parts in rows.values()]
    return _Shard(
        *(path, list(rows), np.array(places, np.int64).reshape(-1, 2), captions, endings, reader),
        *(unused, dotted, damage),
    )


def _warn_left_out(name: str, shards: list[_Shard], count: int) -> None:
    """Warns of what makes no row; ValueError where nothing does."""
    damaged = [f"{shard.path} (after {len(shard.keys)} rows: {shard.damage})" for shard in shards if shard.damage]
    dotted = [f"{shard.path}: {image}" for shard in shards for image in shard.dotted]
    if not count:
        reason = f"; {damaged[0]}" if damaged else ""
        if dotted:
            reason += (
                f"; endings begin at a name's first dot, which leaves out {dotted[0]}: name images without further "
                "dots, or give the whole ending, such as 'v2.jpg', as image_key"
            )
        raise ValueError(f"{name}: no image in {len(shards)} shards{reason}")
    warn_listed(len(shards), f"shards of {name} are damaged, and what follows is left out", damaged)
    left_out = [f"{shard.path}: {unused}" for shard in shards for unused in shard.unused] + dotted
    what = f"names in {name} have no image, come twice or have a further dot, and are left out"
    warn_listed(count + len(left_out), what, left_out)


def _find_shards(name: str, path: str) -> list[str]:
    if os.path.isdir(path):
        if holds_results(path):
            raise ValueError(f"{name}: {path!r} holds results (stage.json); expected a folder of .tar shards")
        shards = [os.path.join(path, file) for file in os.listdir(path) if file.endswith(".tar")]
    else:
        shards = []
        for pattern in _expand(path):
            found = [pattern] if os.path.isfile(pattern) else [f for f in glob.glob(pattern) if os.path.isfile(f)]
            if not found:
                raise FileNotFoundError(f"{name}: {pattern!r} does not exist; expected .tar shards")
            shards += found
    if not shards:
        packed = [file for file in os.listdir(path) if file.endswith(_PACKED)]
        hint = f"; unpack {packed[0]} and the like" if packed else ""
        inner = glob.glob(os.path.join(glob.escape(path), "*", "*.tar"))
        hint += f"; give a pattern that leads to {inner[0]}" if inner else ""
        raise FileNotFoundError(f"{name}: no .tar file in {path!r}; expected shards such as 00000.tar{hint}")
    return sorted(set(shards))


def _expand(pattern: str) -> Iterator[str]:
    """'{00..02}.tar' -> '00.tar', '01.tar', '02.tar'; '{a,b}' likewise."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None or os.path.exists(pattern):
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if bounds:
        choices = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = braces[1].split(",")
    for choice in choices:
        yield from _expand(pattern[: braces.start()] + choice + pattern[braces.end() :])
