"""Settings declared once: dataclass fields whose metadata give the checks, the flags, the documentation and stage.json.

A config is a frozen, keyword-only dataclass that inherits from `Settings`; each of its fields is made by `setting`:

    class LossSettings(Settings):
        stride: int = setting(100, "Timesteps of the score: 0, stride, 2 stride, ...", low=1)
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from attrib_jax.core.checks import check_choice, check_range, expand_path


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its type and default.

    Attributes:
      help: a full phrase for `--help` and docs/FLAGS.md.
      choices: allowed values of a string, or of each entry of a tuple of strings; None allows all.
      low, high: bounds of a number, inclusive.
      above: exclusive lower bound of a number.
      unit: unit of a number, such as "pixels".
      symbol: symbol in docs/METHOD.md, such as "alpha".
      performance: whether it changes speed and memory alone; such settings are no part of what is stored.
      only_if: the setting that this one depends on: its name, where that one has to be given (not None, 0, False or
        empty), or (name, value) where it has to have that value, or hold it among several.
      content: for a file, value -> what decides the result, as a JSON value: the digest of the content, not the path.
      omit_default: whether the default is left out of what is stored, so that results from before there was such a
        setting stay valid.
      path: whether the value is a path, in which `~` is expanded.
      flag: name of the flag; that of the field if None.
    """

    help: str
    choices: Sequence[str] | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    unit: str | None = None
    symbol: str | None = None
    performance: bool = False
    only_if: str | tuple[str, Any] | None = None
    content: Callable[[Any], Any] | None = None
    omit_default: bool = False
    path: bool = False
    flag: str | None = None


def setting(default: Any, help: str, **known: Any) -> Any:
    """A dataclass field that is a setting: its default, its help text, and the other attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **known)})


class Declared(typing.NamedTuple):
    """A field of a config as its declaration has it.

    Attributes:
      name: of the field.
      kind: type of one value: str, int, float or bool.
      many: whether the value is a tuple of such values.
      optional: whether the value may be None.
      default: default value.
      setting: its metadata.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    setting: Setting

    @property
    def flag(self) -> str:
        """Name of the flag."""
        return self.setting.flag or self.name


def declared(config: Any) -> dict[str, Declared]:
    """The settings of a config class by field name, in the order of declaration.

    Raises TypeError for a field of a type that no flag can have.
    """
    return _declared(config)


@functools.cache
def _declared(config: Any) -> dict[str, Declared]:
    hints, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if "setting" in field.metadata:
            found[field.name] = Declared(
                field.name, *_kind(hints[field.name]), field.default, field.metadata["setting"]
            )
    return found


def _kind(hint: Any) -> tuple[type, bool, bool]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in options
    (inner,) = (option for option in options if option is not type(None))
    many = typing.get_origin(inner) is tuple
    kind = typing.get_args(inner)[0] if many else inner
    if kind not in (str, int, float, bool):
        raise TypeError(f"a setting has type {hint}: expected str, int, float, bool, a tuple of one of them, or None")
    return kind, many, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all configs: checks values when it is made and tells which of them decide a result."""

    def __post_init__(self):
        for name, field in declared(type(self)).items():
            object.__setattr__(self, name, _checked(field, getattr(self, name)))
        for name, field in declared(type(self)).items():
            if not self.applies(name) and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but {self._condition(field)}. Leave out {name}, or change "
                    f"{_needed(field)[0]}."
                )

    def applies(self, name: str) -> bool:
        """Whether a setting is in use, by the setting that it depends on."""
        field = declared(type(self))[name]
        if field.setting.only_if is None:
            return True
        needed, value = _needed(field)
        # A method may fix what others let the user set.
        given = getattr(self, needed, None)
        if value is None:
            return bool(given)
        return value in given if isinstance(given, tuple) else given == value

    def describe(self) -> dict[str, Any]:
        """The settings that decide a result, as JSON values: of files their content, nothing that is not in use."""
        described = {}
        for name, field in declared(type(self)).items():
            value = getattr(self, name)
            if field.setting.performance or not self.applies(name):
                continue
            if field.setting.omit_default and value == field.default:
                continue
            if value is not None and field.setting.content is not None:
                value = field.setting.content(value)
            described[name] = list(value) if isinstance(value, tuple) else value
        return described

    def _condition(self, field: Declared) -> str:
        needed, value = _needed(field)
        given = getattr(self, needed, None)
        if value is None:
            return f"{needed} is {given!r}: {field.name} belongs to a {needed} that is given"
        return f"{needed} is {given!r}: {field.name} belongs to {needed}={value!r}"


def _needed(field: Declared) -> tuple[str, Any]:
    needed = field.setting.only_if
    if isinstance(needed, tuple):
        return needed
    return needed or "", None


def _checked(field: Declared, value: Any) -> Any:
    """`value` as the config holds it; ValueError where it is not allowed."""
    if value is None:
        if field.optional:
            return None
        raise ValueError(f"{field.name} is None: expected {_expected(field)}. Change {field.name}.")
    if field.many:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{field.name} is {value!r}: expected a tuple of {_expected(field)}. Change {field.name}.")
        return tuple(_checked_value(field, entry) for entry in value)
    return _checked_value(field, value)


def _checked_value(field: Declared, value: Any) -> Any:
    known = field.setting
    if field.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{field.name} is {value!r}: expected True or False. Change {field.name}.")
        return value
    if field.kind is str:
        if known.path and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}: expected {_expected(field)}. Change {field.name}.")
        if known.choices is not None:
            check_choice(field.name, value, known.choices)
        return expand_path(value) if known.path and value else value
    low, high = known.low if known.low is not None else -math.inf, known.high if known.high is not None else math.inf
    check_range(field.name, value, low, high, integer=field.kind is int)
    if not math.isfinite(value) or (known.above is not None and not value > known.above):
        bound = "" if known.above is None else f" greater than {known.above:g}"
        raise ValueError(f"{field.name} is {value!r}: expected a finite number{bound}. Change {field.name}.")
    return field.kind(value)


def _expected(field: Declared) -> str:
    return {str: "text", int: "whole numbers" if field.many else "a whole number", float: "a number"}.get(
        field.kind, "True or False"
    )


def refuse_unread(given: Mapping[str, Any], chosen: str, readers: Mapping[str, Collection[str]]) -> None:
    """Raises ValueError where a setting is given that the chosen config does not read.

    Args:
      given: the settings that were given, by name.
      chosen: key of the chosen config among `readers`, such as "method 'pixel'".
      readers: names of the settings that each config reads, by what chooses it, such as "method 'trak'".
    """
    for name, value in given.items():
        if name in readers[chosen]:
            continue
        owners = [owner for owner, names in readers.items() if name in names]
        kind = chosen.split(" ", 1)[0]
        names = ", ".join(owner.removeprefix(f"{kind} ") for owner in owners) or "none"
        raise ValueError(
            f"{name} is {value!r}, but {chosen} does not read it: {name} belongs to {kind} {names}. Leave it out, or "
            f"change {kind}."
        )
