"""Captions, wherever a data set keeps them: which fields they are found in, and a word where they are missing."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrib_jax.core.text import BINARY, decode_text, replace_surrogates, split_lines
from attrib_jax.data.files import SHOWN, printable, warn_listed
from attrib_jax.data.protocol import Dataset

_log = logging.getLogger(__name__)

# What data sets call a caption, the usual names first; compared by `normal_name`.
CAPTION_FIELDS = (
    *("text", "caption", "captions", "texts", "prompt", "prompts", "description", "descriptions", "title", "alt"),
    *("alt_text", "alttext", "txt", "sentence", "sentences", "raw_caption", "image_caption", "long_caption"),
    *("short_caption", "top_caption", "blip_caption", "llava_caption", "caption_text", "label_text", "class_name"),
)
# Files that hold an image's caption, by what their names end in, the surest first. A `.cls` is a class.
CAPTION_ENDINGS = (".txt", ".caption", ".captions", ".text", ".prompt", ".json", ".cls")
_SHOWN_FIELDS = 20


def normal_name(name: object) -> str:
    """'Alt-Text ' -> 'alt_text'."""
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def listed_captions(value: object, source: str) -> tuple[str, ...]:
    """A caption, a list of captions, or None -> captions, blank ones left out, at least an empty one.

    What JSON escapes of a cut character counts as '?': reports could not be written with it. Raises ValueError, naming
    `source`, for anything else.
    """
    if isinstance(value, float) and math.isnan(value):  # how tables mark a cell without a value
        value = None
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)) or not all(isinstance(text, str | None) for text in captions):
        raise ValueError(f"{source}: caption is {value!r}; expected a text or a list of texts")
    return tuple(replace_surrogates(text) for text in captions if text and not text.isspace()) or ("",)


def field_captions(fields: Mapping[Any, Any], key: str | None, source: str) -> tuple[str, ...]:
    """The captions among the fields of one row: those of `key`, or of the first usual name that has any.

    Raises ValueError, naming `source`, where no such field has a caption and one holds something else than texts.
    """
    if key is not None:
        return listed_captions(fields[key] if key in fields else _by_name(fields).get(normal_name(key)), source)
    named, wrong = _by_name(fields), None
    for name in CAPTION_FIELDS:
        try:
            captions = listed_captions(named.get(name), source)
        except ValueError as error:
            wrong = wrong or error
            continue
        if captions != ("",):
            return captions
    if wrong is not None:
        raise wrong
    return ("",)


def has_caption_field(names: Iterable[Any], key: str | None) -> bool:
    """Whether `key`, or one of the usual names if None, is among the names of fields."""
    there = set(map(normal_name, names))
    return bool(there & set(CAPTION_FIELDS)) if key is None else normal_name(key) in there


def _by_name(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {normal_name(name): value for name, value in reversed(list(fields.items()))}  # the first of two alike counts


class CaptionReader:
    """Reads files that hold one image's captions, and keeps count of what was odd about them.

    Attributes:
      key: name of the field that holds captions in files in JSON; the usual ones if None.
      guesses: names of files whose encoding had to be guessed, with the guess.
      damaged: names of files in JSON that are damaged, with the reason.
      fields: names of the fields that the files in JSON have, in the order in which they came up.
      read: number of files that were read.
    """

    def __init__(self, key: str | None = None):
        self.key = key
        self.guesses: list[str] = []
        self.damaged: list[str] = []
        self.fields: dict[str, None] = {}
        self.read = 0

    def captions(self, content: bytes, ending: str, name: str, lines: bool = False, cut: bool = False) -> tuple:
        """The captions in a file's content, ("",) where it has none.

        Args:
          content: bytes of the file, or of its beginning.
          ending: one of `CAPTION_ENDINGS`.
          name: file name for messages.
          lines: True if each line of a text is a caption, False if all of it is one.
          cut: True if `content` is only the beginning.
        """
        self.read += 1
        text, guess = decode_text(content, cut)
        if guess == BINARY and not all(character.isprintable() or character.isspace() for character in text):
            self.damaged.append(f"{name} ({guess})")
            return ("",)
        if guess is not None:
            self.guesses.append(f"{name} ({guess})")
        if ending == ".json":
            try:
                return self._json_captions(json.loads(text), name)
            except (ValueError, RecursionError) as error:
                self.damaged.append(f"{name} ({error})")
                return ("",)
        if ending == ".cls" and text.strip().isdecimal():
            return ("",)  # a number: which class it is stands elsewhere
        parts = split_lines(text) if lines else [text]
        return tuple(part.strip() for part in parts if part.strip()) or ("",)

    def _json_captions(self, value: Any, name: str) -> tuple[str, ...]:
        if isinstance(value, dict):
            self.fields |= dict.fromkeys(map(str, value))
            return field_captions(value, self.key, name)
        return listed_captions(value, name) if self.key is None else ("",)

    def merge(self, other: "CaptionReader") -> None:
        """Adds another reader's counts to these."""
        self.guesses += other.guesses
        self.damaged += other.damaged
        self.fields |= other.fields
        self.read += other.read

    def warn(self, dataset: str) -> None:
        """Logs a warning for each kind of oddity."""
        what = f"caption files of {dataset} are not UTF-8 and were read as another encoding; save them as UTF-8"
        warn_listed(self.read, what, self.guesses)
        warn_listed(self.read, f"caption files of {dataset} are damaged and give no caption", self.damaged)


def warn_uncaptioned(
    dataset: str, captions: Sequence[tuple[str, ...]], names: Sequence[str] | None, fields: Iterable[str], advice: str
) -> None:
    """Logs one warning where rows have no caption: how many, the first of them, and what there is in their place.

    Args:
      dataset: name of the data set.
      captions: captions of every row.
      names: names of the rows' images; None for their positions.
      fields: names of the fields, columns and files that are there.
      advice: the end of the message, on what to do.
    """
    without = [row for row, texts in enumerate(captions) if not any(map(str.strip, texts))]
    if not without:
        return
    fields = list(dict.fromkeys(fields))
    there = ", ".join(fields[:_SHOWN_FIELDS]) + (", ..." if len(fields) > _SHOWN_FIELDS else "")
    shown = ", ".join(printable(names[row]) if names is not None else str(row) for row in without[:SHOWN])
    _log.warning(
        "%d of %d rows of %s have no caption (%s); fields that are there: %s; %s",
        *(len(without), len(captions), dataset, shown + (", ..." if len(without) > SHOWN else "")),
        *(there or "none", advice),
    )


def read_captions(dataset: Dataset) -> list[tuple[str, ...]]:
    """The captions of every row, in order; warns of rows without one, unless the data set did when it was opened."""
    captions = [dataset.captions(index) for index in range(len(dataset))]
    if not getattr(dataset, "counts_captions", False):
        fields = getattr(dataset, "fields", ("captions",))
        warn_uncaptioned(dataset.name, captions, None, fields, "such rows count as having an empty caption")
    return captions
