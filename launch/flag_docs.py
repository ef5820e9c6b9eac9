"""Prints docs/FLAGS.md: every flag of every command, from the definitions that `--help` shows.

python -m launch.flag_docs > docs/FLAGS.md
"""

import importlib

from absl import flags

from launch import common, multihost  # noqa: F401, their flags are those that commands share
from launch.cli import commands

_HEAD = """# Flags

Every flag of every command, written by `python -m launch.flag_docs > docs/FLAGS.md` from the definitions that `--help`
shows. A flag file (`--flagfile=FILE`) holds one flag a line; a flag given after it wins. Boolean flags are set by
`--flag` and unset by `--noflag`. Lists are separated by commas.
"""
_SEVERAL_HOSTS = "Flags of `encode`, `fisher` and `attribute`; see [Several hosts](MULTIHOST.md)."


def page() -> str:
    """The text of docs/FLAGS.md."""
    by_module = flags.FLAGS.flags_by_module_dict()
    several = by_module[multihost.__name__]
    every = [flag for name in by_module if name.startswith("launch") for flag in by_module[name] if flag not in several]
    parts = [_HEAD, _section("Every command", "", every), _section("Several hosts", _SEVERAL_HOSTS, several)]
    shared = set(flags.FLAGS)
    for name, description in commands().items():
        module = importlib.import_module(f"launch.{name}")
        own = [flags.FLAGS[flag] for flag in flags.FLAGS if flag not in shared]
        own.sort(key=lambda flag: flag.name)
        text = f"{description}\n\n    python -m {module.__name__} --help"
        parts.append(_section(f"`{name}`", text, own))
        # Commands have flags of the same names, which one program cannot define twice.
        for flag in own:
            delattr(flags.FLAGS, flag.name)
    return "\n".join(parts)


def _section(title: str, text: str, rows: list[flags.Flag]) -> str:
    lines = [f"## {title}\n", *([f"{text}\n"] if text else [])]
    lines += ["| flag | default | meaning |", "|---|---|---|"] if rows else ["It has the flags of every command only."]
    for flag in rows:
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        lines.append(f"| `--{name}` | {_default(flag)} | {_meaning(flag)} |")
    return "\n".join(lines) + "\n"


def _default(flag: flags.Flag) -> str:
    value = flag.default
    if value is None or value in ([], ()):
        return ""
    return f"`{','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def _meaning(flag: flags.Flag) -> str:
    text = " ".join((flag.help or "").split())
    choices = getattr(flag.parser, "enum_values", None) or getattr(flag.parser, "choices", None)
    if choices:
        # absl puts them before the text, as in `<newton|sgd>: Update rule`.
        text = text.partition(">: ")[2] if text.startswith("<") else text
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
