"""Command-line flags made from the settings of configs (attrib_jax/core/settings.py): declared there, once."""

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from attrib_jax.core.checks import check_choice
from attrib_jax.core.settings import Declared, Settings, declared, refuse_unread

# Flags belong to the module that calls `define_flags`, whose `--help` lists them.
flags.disclaim_key_flags()


_log = logging.getLogger(__name__)


class _ChoiceParser(flags.ArgumentParser):
    """An enumeration whose error suggests the nearest name."""

    def __init__(self, name: str, choices: Iterable[str]):
        self.name, self.choices = name, tuple(choices)
        self.syntactic_help = f"one of: {', '.join(self.choices)}"

    def parse(self, argument: str) -> str:
        check_choice(self.name, argument, self.choices)
        return argument

    def flag_type(self) -> str:
        return "string enum"


def define_flags(*configs: type[Settings], skip: Iterable[str] = (), defaults: Mapping[str, Any] | None = None) -> None:
    """Defines a flag for every setting of the configs, once where several have it; a module calls it when imported.

    Args:
      configs: config classes.
      skip: flags that are not defined, such as the one that chooses the config.
      defaults: flag -> its default, where the command's differs from the config's.
    """
    for field in _fields(configs).values():
        if field.flag in skip or field.flag in flags.FLAGS:
            continue
        _define(field, (defaults or {}).get(field.flag, field.default))


def define_mode_flags(modes: Mapping[str, type[Settings]], skip: Iterable[str] = ()) -> None:
    """Defines the flags of configs of which a run reads one.

    A flag whose default differs between them has none: its help lists the defaults, and where it is not given
    `read_config` leaves the config's own.

    Args:
      modes: config class by name of the mode.
      skip: flags that are not defined.
    """
    for field in _fields(modes.values()).values():
        name = field.name
        if field.flag in skip or field.flag in flags.FLAGS:
            continue
        own = {mode: declared(config)[name].default for mode, config in modes.items() if name in declared(config)}
        if len(set(own.values())) > 1:
            help = f"{field.setting.help} Default: {_listed(own)}."
            field = field._replace(setting=dataclasses.replace(field.setting, help=help), default=None)
        _define(field, None if field.default is dataclasses.MISSING else field.default)


def _listed(defaults: Mapping[str, Any]) -> str:
    """Defaults by mode, the one that most have first where several have it."""
    counts = Counter(defaults.values())
    usual, count = counts.most_common(1)[0]
    listed = ", ".join(f"{value} for {mode}" for mode, value in defaults.items() if count == 1 or value != usual)
    return listed if count == 1 else f"{usual}, but {listed}"


def define_choice(name: str, default: str | None, choices: Iterable[str], help: str) -> flags.FlagHolder:
    """Defines a flag with one of `choices`; the error of another value suggests the nearest one."""
    return flags.DEFINE(_ChoiceParser(name, choices), name, default, help, serializer=flags.ArgumentSerializer())


def read_config(config: type[Settings], **values: Any) -> Any:
    """The config that the flags give; `values` are those of fields without a flag."""
    given = {}
    for name, field in declared(config).items():
        if name not in values and field.flag in flags.FLAGS:
            value = flags.FLAGS[field.flag].value
            # As in `--fisher=`, which takes back what a flagfile says.
            value = None if value == "" and field.optional else value
            # A flag without a default leaves that of the config.
            if value is not None or field.optional or flags.FLAGS[field.flag].default is not None:
                given[name] = value
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return config(**{**given, **values})


def check_unread(
    chosen: str, readers: Mapping[str, type[Settings] | Sequence[type[Settings]]], flagfiles: bool = False
) -> None:
    """Refuses flags on the command line that the chosen config does not read.

    Args:
      chosen: key of the chosen config, or configs, among `readers`, such as "method 'pixel'".
      readers: configs by what chooses them.
      flagfiles: whether flags of a flagfile are refused too; a flagfile may serve several methods, and what one of them
        does not read is then reported in a warning.

    Raises ValueError, see `refuse_unread`.
    """
    read = {
        owner: set(_fields([configs] if isinstance(configs, type) else configs)) for owner, configs in readers.items()
    }
    known = sorted({name for names in read.values() for name in names if name in flags.FLAGS})
    given = {
        name: flags.FLAGS[name].value
        for name in known
        if flags.FLAGS[name].present and flags.FLAGS[name].value != flags.FLAGS[name].default
    }
    direct = {name: value for name, value in given.items() if flagfiles or _on_command_line(name)}
    refuse_unread(direct, chosen, read)
    unread = [f"--{name}" for name in given if name not in direct and name not in read[chosen]]
    if unread:
        _log.warning("%s of the flagfile: %s does not read them", ", ".join(unread), chosen)


def _on_command_line(flag: str) -> bool:
    names = {argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")}
    return bool({flag, f"no{flag}"} & names)


def _fields(configs: Iterable[type[Settings]]) -> dict[str, Declared]:
    """Fields of configs by the names of their flags."""
    found: dict[str, Declared] = {}
    for config in configs:
        for field in declared(config).values():
            found.setdefault(field.flag, field)
    return found


def _define(field: Declared, default: Any) -> None:
    known, name, text = field.setting, field.flag, help_text(field)
    if field.many:
        values = None if default is None else [str(value) for value in default]
        parser = None if field.kind is str else _NumbersParser(field)
        if parser is None:
            flags.DEFINE_list(name, values, text)
        else:
            flags.DEFINE(
                parser, name, None if default is None else tuple(default), text, serializer=_NumbersSerializer()
            )
    elif field.kind is str and known.choices is not None:
        flags.DEFINE(_ChoiceParser(name, known.choices), name, default, text, serializer=flags.ArgumentSerializer())
    elif field.kind is bool:
        flags.DEFINE_boolean(name, default, text)
    elif field.kind is int:
        low = known.low if known.low is not None else None if known.above is None else int(known.above) + 1
        low, high = (None if bound is None else int(bound) for bound in (low, known.high))
        flags.DEFINE_integer(name, default, text, low, high)
    elif field.kind is float:
        flags.DEFINE_float(name, default, text, lower_bound=known.low, upper_bound=known.high)
    else:
        flags.DEFINE_string(name, default, text)


class _NumbersParser(flags.ArgumentParser):
    """Numbers separated by commas."""

    def __init__(self, field: Declared):
        self.field = field
        self.syntactic_help = "a comma separated list of numbers"

    def parse(self, argument: Any) -> tuple[float, ...] | None:
        if not isinstance(argument, str):
            return argument
        try:
            if not argument:
                return None if self.field.optional else ()
            return tuple(self.field.kind(part) for part in argument.split(","))
        except ValueError as error:
            kind = "whole numbers" if self.field.kind is int else "numbers"
            raise ValueError(f"{self.field.flag} is {argument!r}: expected {kind}, separated by commas") from error

    def flag_type(self) -> str:
        return "comma separated list of numbers"


class _NumbersSerializer(flags.ArgumentSerializer):
    def serialize(self, value: tuple[float, ...]) -> str:
        return ",".join(map(str, value))


def help_text(field: Declared) -> str:
    """Help of a setting with its symbol and unit."""
    known = field.setting
    notes = [
        *([f"{known.symbol} in docs/METHOD.md"] if known.symbol else []),
        *([f"in {known.unit}"] if known.unit else []),
        *([f"only with {_condition(known.only_if)}"] if known.only_if else []),
        *(["changes speed and memory only"] if known.performance else []),
    ]
    return f"{known.help} ({'; '.join(notes)})" if notes else known.help


def _condition(only_if: str | tuple[str, Any]) -> str:
    return f"--{only_if}" if isinstance(only_if, str) else f"--{only_if[0]}={only_if[1]}"
