"""Prints docs/FLAGS.md: every flag of every command, from the definitions that `--help` shows.

python -m launch.flag_docs > docs/FLAGS.md
"""

import importlib

from absl import flags

from launch import common  # noqa: F401, the flags that commands share
from launch.cli import commands

_HEAD = """# Flags

Every flag of every command, written by `python -m launch.flag_docs > docs/FLAGS.md` from the definitions that `--help`
shows. A flag file (`--flagfile=FILE`) holds one flag a line; a flag given after it wins. Boolean flags are set by
`--flag` and unset by `--noflag`. Lists are separated by commas.
"""
_SHARED = """Flags of all commands: the model, the data set and the workdir. Those of several hosts are for `encode`,
`fisher` and `attribute`; see [Several hosts](MULTIHOST.md)."""


def page() -> str:
    """The text of docs/FLAGS.md."""
    by_module = flags.FLAGS.flags_by_module_dict()
    parts = [
        _HEAD,
        _section("Shared", _SHARED, [flag for name in by_module if "launch" in name for flag in by_module[name]]),
    ]
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
    lines = [f"## {title}\n\n{text}\n"]
    lines += ["| flag | default | meaning |", "|---|---|---|"] if rows else ["It has the shared flags only."]
    for flag in rows:
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        lines.append(f"| `--{name}` | {_default(flag)} | {_meaning(flag)} |")
    return "\n".join(lines) + "\n"


def _default(flag: flags.Flag) -> str:
    if flag.default is None or flag.default == []:
        return ""
    return f"`{','.join(flag.default) if isinstance(flag.default, list) else flag.default}`"


def _meaning(flag: flags.Flag) -> str:
    text = " ".join((flag.help or "").split())
    # absl puts the values of an enumeration before the text, as in `<newton|sgd>: Update rule`.
    if text.startswith("<") and ">: " in text:
        values, _, text = text[1:].partition(">: ")
        text = f"{text} One of {', '.join(f'`{value}`' for value in values.split('|'))}."
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
