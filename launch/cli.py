"""The console command: `attrib-jax COMMAND [flags]` is `python -m launch.COMMAND [flags]`, from any folder.

attrib-jax attribute --flagfile=configs/quickstart.cfg
attrib-jax train --help
"""

import ast
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import process

_NOT_COMMANDS = ("cli", "flag_docs")


def commands() -> dict[str, str]:
    """Command -> first line of its description, read from the source of `launch`: importing all would take seconds."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        starts = isinstance(tree.body[-1], ast.If) and "__main__" in ast.unparse(tree.body[-1].test)
        if "main" in names and starts and path.stem not in _NOT_COMMANDS:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def command_line(argv: Sequence[str]) -> list[str]:
    """The Python command line of `attrib-jax ...`; raises ValueError where its first argument is not a command."""
    known = commands()
    name = argv[1] if len(argv) > 1 else ""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"command is {name!r}: expected one of {', '.join(known)}; {hint}see attrib-jax --help")
    # -P: a folder called `launch` where the command is run has nothing to do with it.
    return [sys.executable, "-P", "-m", f"launch.{name}", *argv[2:]]


def main() -> None:
    """Replaces this process by the command, or prints the list of commands."""
    if sys.argv[1:] in ([], ["help"], ["-h"], ["--help"]):
        print("Usage: attrib-jax COMMAND [--flag=value ...]\n\nCommands:")
        for name, description in commands().items():
            print(f"  {name:<10} {description}")
        print("\nattrib-jax COMMAND --help lists the flags of a command.")
        return
    try:
        line = command_line(sys.argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.execve(line[0], line, process.with_huge_pages(os.environ))


if __name__ == "__main__":
    main()
