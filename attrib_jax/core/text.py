"""Texts from elsewhere: how their bytes are decoded, and what neither files nor tokenizers take."""

import codecs
import contextlib
import logging
import os
import re
from typing import NamedTuple

_log = logging.getLogger(__name__)
# UTF-32 before UTF-16, whose little-endian mark begins the other's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_MARK = "\ufeff"
# A text in UTF-8 has no NUL; of one in UTF-16, every other byte is where it is mostly ASCII.
_MANY_NULS = 1 / 4
BINARY = "binary data"


class DecodedText(NamedTuple):
    """A text, and what its encoding was taken for where that is a guess, None where it is UTF-8 or marked."""

    text: str
    guess: str | None


def decode_text(content: bytes, cut: bool = False) -> DecodedText:
    """Decodes a text file's content, whatever wrote it; never fails.

    The first of these that fits: the encoding that a byte order mark names (UTF-8, UTF-16, UTF-32); UTF-16 or UTF-32
    without a mark, by its NULs; UTF-8; UTF-8 with damaged characters, which become U+FFFD, where most others are whole;
    Windows-1252; Latin-1. Nothing else is changed: neither the Unicode normal form nor line separators.

    Args:
      content: bytes of the file.
      cut: True if `content` is only the beginning, so that a character that lacks its end is left out.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            marked = _decode(content[len(mark) :], encoding, "replace", cut)
            return DecodedText(marked.lstrip(_MARK), f"damaged {encoding}" if "\ufffd" in marked else None)
    text: str | None = None
    with contextlib.suppress(UnicodeDecodeError):
        text = _decode(content, "utf-8", "strict", cut)
    nuls = content.count(0)
    if nuls and (text is None or nuls >= _MANY_NULS * len(content)):
        for encoding in sorted(_WIDE, key=lambda wide: -_fit(content, wide)):
            try:
                wide = _decode(content, encoding, "strict", cut)
            except UnicodeDecodeError:
                continue
            if all(character.isprintable() or character.isspace() for character in wide):
                return DecodedText(wide, f"{encoding} without a mark")
    if nuls:
        text = _decode(content, "utf-8", "replace", cut) if text is None else text
        return DecodedText(text.replace("\0", ""), BINARY)
    if text is not None:
        return DecodedText(text, None)
    text = _decode(content, "utf-8", "replace", cut)
    damaged = text.count("\ufffd")
    if sum(not character.isascii() for character in text) >= 2 * damaged:
        return DecodedText(text, "damaged utf-8")
    try:
        return DecodedText(content.decode("cp1252"), "Windows-1252")
    except UnicodeDecodeError:
        return DecodedText(content.decode("latin-1"), "Latin-1")


def read_text(path: str | os.PathLike) -> str:
    """A text file's content, see `decode_text`; a warning says where its encoding is a guess.

    Raises ValueError where it holds binary data.
    """
    with open(path, "rb") as file:
        text, guess = decode_text(file.read())
    if guess == BINARY:
        raise ValueError(f"{os.fspath(path)} holds {guess}; expected a text in UTF-8")
    if guess is not None:
        _log.warning("%s is not UTF-8 and was read as %s; save it as UTF-8 if words look wrong", path, guess)
    return text


def split_lines(text: str) -> list[str]:
    r"""Lines of a text, without their ends: "\n", "\r\n" or "\r".

    Not `str.splitlines`, which also splits at form feeds, U+0085, U+2028 and others that stand within sentences.
    """
    return re.split("\r\n|\n|\r", text)


def replace_surrogates(text: str) -> str:
    """`text` with '?' for each half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _decode(content: bytes, encoding: str, errors: str, cut: bool) -> str:
    return codecs.getincrementaldecoder(encoding)(errors).decode(content, final=not cut)


def _fit(content: bytes, encoding: str) -> int:
    """NULs where an encoding of 2 or 4 bytes has them for ASCII, less those where it has none."""
    width = 4 if "32" in encoding else 2
    places = [content[place::width].count(0) for place in range(width)]
    letter = places[0] if encoding.endswith("le") else places[-1]
    return sum(places) - 2 * letter
