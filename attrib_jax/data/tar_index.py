"""Where the files in a tar archive lie, from their headers alone.

Written by hand: `tarfile` allocates what a damaged header claims and, up to Python 3.13, can loop forever on one.
"""

import os
from typing import NamedTuple

from attrib_jax.data.protocol import FilePart

_BLOCK = 512
# A long name, or a block of extended attributes; real ones have a few hundred bytes.
_MAX_EXTENSION_BYTES = 2**20
_REGULAR, _LONG_NAME, _EXTENDED, _GLOBAL = (b"0", b"\0", b"7"), b"L", (b"x", b"X"), b"g"
# Links, devices, folders and pipes: no data follows, whatever their size says.
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_SPARSE = b"S"


class TarIndex(NamedTuple):
    """Regular files of an archive in stored order, as (name, part), and what is wrong with it after them, or None."""

    members: list[tuple[str, FilePart]]
    damage: str | None


def index_tar(path: str | os.PathLike) -> TarIndex:
    """Reads the headers of an uncompressed ustar, GNU or pax archive; reading stops at the first damaged one.

    Every part that is returned lies within the file. Names are decoded as UTF-8 and never used as paths.
    """
    path = os.fspath(path)
    members: list[tuple[str, FilePart]] = []
    with open(path, "rb") as file:
        try:
            for name, offset, size in _walk(file, os.fstat(file.fileno()).st_size):
                members.append((name, FilePart(path, offset, size)))
        except _DamageError as damage:
            return TarIndex(members, str(damage))
    return TarIndex(members, None)


class _DamageError(Exception):
    pass


def _walk(file, length: int):
    position, long_name = 0, None
    extended: dict = {}
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise _DamageError(f"it ends at byte {length}, without the mark of an archive's end")
        if not any(header):
            return
        _check_sum(header, position)
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_DATA else _number(header[124:136], position)
        if kind in _REGULAR and "size" in extended:
            size = _number(extended["size"], position, base=10)
        start = position + _BLOCK
        name = long_name or extended.get("path") or _name(header)
        if not 0 <= size <= length - start:
            raise _DamageError(
                f"{_text(name)!r} at byte {position} claims {size} bytes, and the file has {length - start} more"
            )
        if kind == _SPARSE:
            raise _DamageError(f"{_text(name)!r} is a sparse file; pack it with plain tar")
        if kind == _LONG_NAME or kind in _EXTENDED:
            if size > _MAX_EXTENSION_BYTES:
                raise _DamageError(f"the name or attributes at byte {position} claim {size} bytes")
            content = file.read(size)
            if kind == _LONG_NAME:
                long_name = content.rstrip(b"\0")
            else:
                extended = _records(content, position)
        elif kind != _GLOBAL:
            if kind in _REGULAR and not (kind == b"\0" and name.endswith(b"/")):
                yield _text(name), start, size
            long_name, extended = None, {}
        position = start + -(-size // _BLOCK) * _BLOCK


def _check_sum(header: bytes, position: int) -> None:
    # The sum is over the header with spaces in the sum's own place.
    expected = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    try:
        stored = _number(header[148:156], position)
    except _DamageError:
        stored = None
    if stored != expected:
        raise _DamageError(f"there is no header at byte {position}: it is damaged, or not an uncompressed tar file")


def _number(field: bytes, position: int, base: int = 8) -> int:
    try:
        if field[:1] == b"\x80":  # GNU: binary, for what has no room in octal digits
            return int.from_bytes(field[1:], "big")
        return int(field.strip(b" \0") or b"0", base)
    except ValueError as error:
        raise _DamageError(f"the header at byte {position} has {field!r} for a number") from error


def _name(header: bytes) -> bytes:
    name, prefix = (field.split(b"\0", 1)[0] for field in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _records(content: bytes, position: int) -> dict[str, bytes]:
    """The pax records "length key=value\\n"."""
    records = {}
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        length = _number(digits, position, base=10) if space else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 1 < length <= len(content) or not equals:
            raise _DamageError(f"the attributes at byte {position} are damaged")
        records[_text(key)] = value
        content = content[length:]
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="replace")
