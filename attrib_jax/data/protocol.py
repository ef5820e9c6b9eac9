"""The protocol that every data set of captioned images follows: row id, image, captions."""

import errno
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from attrib_jax.core.fingerprint import digest

# Why opening a file fails where there is none, rather than where a disk or a network is to blame.
ABSENT_ERRNOS = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP))
_SAMPLE_BYTES = 4096
_WHOLE_BYTES = 2**16
_BLOCKS = 2
_PIECE_BYTES = 2**20
# How files in compressed formats begin: JPEG, PNG, GIF, WebP, JPEG 2000; AVIF has its mark further on.
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")
# Group of a row that names none, in a data set whose other rows do.
NO_GROUP = "(none)"
_READERS = 8
_BATCH = 256


class Row(NamedTuple):
    """One captioned image: image (H, W, 3) uint8, its captions (at least one), and its row id.

    `original` is its (height, width) before it was resized and cropped; None where that is not known.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    row_id: int
    original: tuple[int, int] | None = None


class Dataset(Protocol):
    """Random access to captioned images; `dataset[i]` may be called from several threads.

    Data sets can be pickled, for worker processes: each process opens the files itself when it first reads.

    `dataset[i]` raises UnreadableRowError where an image cannot be read. A row without a caption has captions ("",).
    `captions(i)` does not read the image. A data set that warns of rows without a caption when it is opened has
    `counts_captions = True`; for others `captions.read_captions` does.

    Attributes:
      name: name of the data set, as for `open_dataset`.
      row_ids: (N,) int32, distinct, the same on every machine.
      groups: (N,) int32 near-duplicate group of each row, or None.
      group_names: (N,) name of the group that a user asks about, such as each image's artist or licence, `NO_GROUP`
        for a row that names none; None for a data set without. Near-duplicates are `groups`.
      credit: the licence line that has to stand beside the images, or None.
      credit_url: address of the licence, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def row_ids(self) -> np.ndarray: ...

    @property
    def groups(self) -> np.ndarray | None: ...

    @property
    def group_names(self) -> Sequence[str] | None: ...

    @property
    def credit(self) -> str | None: ...

    @property
    def credit_url(self) -> str | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def captions(self, index: int) -> tuple[str, ...]: ...

    def fingerprint(self) -> str: ...


def named_groups(dataset: Dataset) -> Sequence[str] | None:
    """The data set's `group_names`; None for a class that was written without."""
    return getattr(dataset, "group_names", None)


class FilePart(NamedTuple):
    """Where an image lies: `size` bytes of the file `path` from `offset` on; the size is None for a whole file."""

    path: str
    offset: int = 0
    size: int | None = None


def hash_rows(dataset: Dataset) -> str:
    """sha256 of a data set's content, in row order, by reading all of it."""
    rows = (dataset[index] for index in range(len(dataset)))
    return digest(part for row in rows for part in (repr((row.row_id, row.captions, row.image.shape)), row.image))


def hash_files(described: Iterable[object], parts: Sequence[FilePart], images: bool = True) -> str:
    """sha256 of what `described` says, and of the size and the content, or samples of the content, of each of `parts`.

    Every command compares a data set's fingerprint with that of the stages that it reuses. Reading 18 GB of images
    for that would cost minutes at each start. Of an image in a compressed format, such as JPEG or PNG, samples show
    that it was exchanged, cut or encoded again; the others, such as BMP and TIFF, keep all but a few bytes where a
    pixel changes, and are read whole.

    Args:
      described: everything about the rows but the images' bytes, such as row ids, captions and file names; hashed by
        its `repr`.
      parts: the images, or files of many; one that does not exist counts as absent.
      images: True if each part is one image. Up to 64 KiB, and where it is not compressed, all of it is read, else its
        first and last 4 KiB and two blocks between them. Of a file of many images the first and last 4 KiB are.
    """
    descriptions = (repr(item).encode("utf-8", "surrogatepass") for item in described)
    # Threads, because on a network disk almost all of the time is waiting.
    batches = [parts[start : start + _BATCH] for start in range(0, len(parts), _BATCH)]
    with ThreadPoolExecutor(_READERS) as pool:
        samples = pool.map(lambda batch: b"".join(_sample(part, images) for part in batch), batches)
        return digest(itertools.chain(descriptions, samples))


def _sample(part: FilePart, image: bool) -> bytes:
    """A line for one part: its size and a digest."""
    try:
        with open(part.path, "rb") as file:
            size = file.seek(0, 2) if part.size is None else part.size
            file.seek(part.offset)
            head = file.read(min(size, _SAMPLE_BYTES))
            if image and (size <= _WHOLE_BYTES or not _is_compressed(head)):
                pieces = iter(lambda: file.read(min(_PIECE_BYTES, part.offset + size - file.tell())), b"")
                return f"{size} {digest(itertools.chain([head], pieces))}\n".encode()
            blocks = [head]
            last = max(size - _SAMPLE_BYTES, 0)
            for number in range(1, _BLOCKS + 1) if image else ():
                file.seek(part.offset + last * number // (_BLOCKS + 1))
                blocks.append(file.read(_SAMPLE_BYTES))
            file.seek(part.offset + last)
            blocks.append(file.read(min(size, _SAMPLE_BYTES)))
    except OSError as error:
        if error.errno not in ABSENT_ERRNOS:
            raise
        return b"absent\n"
    return f"{size} {digest(b''.join(blocks))}\n".encode()


def _is_compressed(head: bytes) -> bool:
    return head.startswith(_COMPRESSED) or head[4:8] == b"ftyp"
