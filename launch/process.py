"""Huge pages for a command's large arrays: the C library takes that setting when a process starts, and never later."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Replaces a command's process by one that uses huge pages, where the system gives them on request.

    A compiled program on a CPU allocates its working memory anew at every call, and mapping it in pages of 4 KiB costs
    up to a third of the time (docs/PERFORMANCE.md). Call it from `main` before any work. Returns where there is
    nothing to gain: in such a process already, with a GLIBC_TUNABLES of the user's, on other systems, and in programs
    that are not run as `python -m launch.NAME` or `python -m benchmarks.NAME`.
    """
    environment = with_huge_pages(os.environ)
    if environment != os.environ and is_command(sys.orig_argv):
        os.execve(sys.executable, sys.orig_argv, environment)


def is_command(argv: Sequence[str]) -> bool:
    """Whether an interpreter's command line runs a command or a benchmark of this project."""
    module = argv[argv.index("-m") + 1] if "-m" in argv[:-1] else ""
    return module.startswith(("launch.", "benchmarks."))


def with_huge_pages(environment: Mapping[str, str], kernel_setting: str | None = None) -> dict[str, str]:
    """An environment to start a process in, with huge pages asked for where that has an effect.

    Args:
      environment: a GLIBC_TUNABLES in it stays as it is.
      kernel_setting: the kernel's, such as `always [madvise] never`, where only `madvise` waits for a request; None
        reads it.
    """
    if kernel_setting is None:
        linux = sys.platform == "linux" and _KERNEL_SETTING.exists()
        kernel_setting = _KERNEL_SETTING.read_text() if linux else ""
    if TUNABLES in environment or "[madvise]" not in kernel_setting:
        return dict(environment)
    return {**environment, TUNABLES: "glibc.malloc.hugetlb=1"}
