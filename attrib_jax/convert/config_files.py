"""JSON files of a model folder: reading, writing, and checking the values in them."""

import json
import math
import os
import types
import typing
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


# Lowest allowed number by option. Others are counts from 1, or finite numbers above 0.
_LOWEST = {
    **dict.fromkeys(("image_mean", "shift_factor"), -math.inf),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(
        ("dual_attention_layers", "freq_shift", "num_register_tokens", "resample", "steps_offset", "trained_betas"), 0
    ),
}
# Highest: more would take the machine's memory or time before anything else is noticed.
_HIGHEST = {
    **dict.fromkeys(("num_hidden_layers", "layers_per_block", "transformer_layers_per_block"), 1000),
    "num_train_timesteps": 10**6,
}
_LARGEST = 2**31 - 1
_NOUNS = {bool: "true or false", str: "a text", dict: "an object", types.NoneType: "null"}


def check_values(content: Mapping[str, Any], options: type | Mapping[str, Any], source: str) -> None:
    """Checks the types and bounds of the options that a JSON object gives; absent ones have defaults.

    Args:
      content: the JSON object.
      options: a config dataclass, whose field types count, or option -> type. Unions, and tuples for lists, are
        understood. Null is allowed where the type has None, and for true or false, as older files have it.
      source: the file, for the message.

    Raises ValueError with the file, the option, its value and what was expected.
    """
    hints = options if isinstance(options, Mapping) else typing.get_type_hints(options)
    for name, hint in hints.items():
        if name in content and not _fits(content[name], hint, name):
            raise ValueError(f"{source}: {name} is {content[name]!r}; expected {_describe(hint, name)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any, name: str) -> bool:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            if isinstance(value, list | tuple) and value and (inner[-1] is Ellipsis or len(value) == len(inner)):
                if all(_fits(item, inner[0], name) for item in value):
                    return True
        elif kind in (int, float):
            # bool is an int to Python, but true as a number is a slip. NaN fails every comparison.
            if isinstance(value, int if kind is int else int | float) and not isinstance(value, bool):
                low, high = _LOWEST.get(name), _HIGHEST.get(name, _LARGEST)
                low = 1 if low is None and kind is int else low
                if value <= high and math.isfinite(value) and (value > 0 if low is None else value >= low):
                    return True
        elif kind is bool:
            if value is None or isinstance(value, bool):
                return True
        elif isinstance(value, kind):
            return True
    return False


def _describe(hint: Any, name: str) -> str:
    words = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            length = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            words.append(f"a list of {length}entries, each {_describe(inner[0], name)}")
        elif kind in (int, float):
            low = _LOWEST.get(name, 1 if kind is int else None)
            limit = " greater than 0" if low is None else f" of at least {low}" if low > -math.inf else ""
            limit += f" and at most {_HIGHEST[name]}" if name in _HIGHEST else ""
            words.append(("a whole number" if kind is int else "a finite number") + limit)
        else:
            words.append(_NOUNS[kind])
    return ", or ".join(words)
