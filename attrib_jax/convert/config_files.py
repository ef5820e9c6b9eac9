"""JSON files of a model folder: reading and writing them."""

import json
import os
from collections.abc import Mapping
from typing import Any


def read_config(folder: str) -> dict[str, Any]:
    """The content of a part's config.json; raises FileNotFoundError and ValueError as `read_json`."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder!r} has no config.json; give a model folder in the diffusers layout")
    return read_json(path)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; raises ValueError, naming the file, where it is damaged or holds something else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(content: Mapping[str, Any], path: str) -> None:
    """Writes a JSON object, its keys sorted; makes the folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
