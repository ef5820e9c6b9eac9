"""Reading many queries from a JSON Lines file."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from attrib_jax.core.checks import expand_path
from attrib_jax.core.text import read_text, split_lines
from attrib_jax.jobs.query import Query, check_query_name

_LISTED = 10  # bad lines shown
# Keys of a line, and what their values have to be.
_KEYS: dict[str, Any] = {"prompt": str, "seed": int, "image": str, "name": str, "guidance_scale": (int, float)}


class NamedQueries(NamedTuple):
    """The queries of a file, and the names of their folders, None where one is to be made from the query."""

    queries: list[Query]
    names: list[str | None]


def read_queries(file: str | os.PathLike, defaults: Query | None = None) -> NamedQueries:
    """Reads queries from a JSON Lines file.

    Each line is an object with `prompt`, and maybe `seed`, `image` (the path of an image, relative to the file),
    `name` and `guidance_scale`; the rest is that of `defaults`, of a `Query` if None. Blank lines are skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: lines are no such objects, name an image that does not exist, or have one name; or there is no query.
    """
    file = Path(expand_path(file))
    lines = split_lines(read_text(file))
    queries, names, problems = [], [], []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            query, name = _parse(line, file.parent, defaults or Query(prompt=""))
            if name is not None and first_line.setdefault(name, number) != number:
                raise ValueError(f"name {name!r} is that of line {first_line[name]} too; give each query its own")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        queries.append(query)
        names.append(name)
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError("\n  ".join([f"{file} has lines that are no queries:", *problems[:_LISTED], *more]))
    if not queries:
        raise ValueError(f'{file} has no queries; expected lines such as {{"prompt": "woman astronaut", "seed": 0}}')
    return NamedQueries(queries, names)


def _parse(line: str, folder: Path, defaults: Query) -> tuple[Query, str | None]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f'{line.strip()[:40]!r} is no object; expected one such as {{"prompt": "woman astronaut"}}')
    unknown = sorted(values.keys() - _KEYS.keys())
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    for key, value in values.items():
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kind = {str: "a string", int: "a whole number"}.get(_KEYS[key], "a number")
            raise ValueError(f"{key} is {value!r}; expected {kind}")
    if "prompt" not in values:
        raise ValueError("prompt is absent; every query needs one, if only an empty string")
    name = values.pop("name", None)
    if name is not None:
        check_query_name(name)
    if "image" in values:
        values["image"] = folder / expand_path(values["image"])
        if not values["image"].is_file():
            raise ValueError(f"image {os.fspath(values['image'])!r} does not exist; paths are relative to this file")
    return dataclasses.replace(defaults, **values), name
