"""The commands, `python -m launch.NAME`.

On Linux they start themselves once more with huge pages for large arrays: a compiled program on a CPU allocates its
working memory anew at every call, and mapping it in pages of 4 KiB cost up to a third of the time ("Speed" in
BUILD_NOTES.md). The C library takes the setting from the environment of a process that starts, and nowhere else.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(argv: Sequence[str], environment: Mapping[str, str], setting: str) -> dict[str, str] | None:
    """The environment to start `argv` again in, None where it is to go on as it is.

    Args:
      argv: the interpreter's whole command line; only `-m launch.NAME` and `-m benchmarks.NAME` are started again.
      environment: a GLIBC_TUNABLES in it is the user's choice.
      setting: the kernel's, such as `always [madvise] never`; only with `madvise` there is something to ask for.
    """
    module = argv[argv.index("-m") + 1] if "-m" in argv[:-1] else ""
    if not module.startswith(("launch.", "benchmarks.")) or TUNABLES in environment or "[madvise]" not in setting:
        return None
    return {**environment, TUNABLES: "glibc.malloc.hugetlb=1"}


if sys.platform == "linux" and _SETTING.exists():
    _environment = huge_pages(sys.orig_argv, os.environ, _SETTING.read_text())
    if _environment is not None:
        os.execve(sys.executable, sys.orig_argv, _environment)
