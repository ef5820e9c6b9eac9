"""Processes that take turns: one object lives in each, its methods are called from here, and its memory is watched."""

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from typing import Any

_INTERVAL = 0.01  # seconds between two looks at the memory


class Worker:
    """An object in a fresh process of its own; one that is not called waits without using a core.

    Memory is the anonymous memory of the process (RssAnon of /proc): pages of mapped files, which the system can drop
    at any time, are not in it.
    """

    def __init__(self, target: str, *arguments: Any, without: Sequence[str] = ()):
        """Starts a process and makes the object there.

        Args:
          target: "module:class".
          arguments: arguments of the class; picklable.
          without: environment variables that the process does not inherit.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, target, arguments))
        kept = {name: os.environ.pop(name) for name in without if name in os.environ}
        try:
            self._process.start()
        finally:
            os.environ.update(kept)
        there.close()
        self.peak = 0
        self._await(target)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        """What `method` returns there; `peak` rises to the most memory that the process held meanwhile, in bytes.

        Raises RuntimeError with the traceback if the method raised or the process ended.
        """
        self._pipe.send((method, arguments))
        return self._await(method)

    def memory(self) -> int:
        """Bytes of anonymous memory now."""
        with open(f"/proc/{self._process.pid}/status", encoding="ascii") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0)

    def cpu_seconds(self) -> float:
        """Seconds of all cores that the process has used since it started."""
        with open(f"/proc/{self._process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _await(self, what: str) -> Any:
        while not self._pipe.poll(_INTERVAL):
            self.peak = max(self.peak, self.memory())
        try:
            error, value = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"the process of {what} ended with exit code {self._process.exitcode}") from None
        if error is not None:
            raise RuntimeError(f"{what} failed in its process:\n{error}")
        self.peak = max(self.peak, self.memory())
        return value


def busy_seconds() -> float:
    """Seconds that the machine's cores have spent on any process since it started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system = (int(field) for field in file.readline().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _serve(pipe, target: str, arguments: tuple) -> None:
    served = None
    while True:
        try:
            if served is None:
                module, _, name = target.partition(":")
                served, value = getattr(importlib.import_module(module), name)(*arguments), None
            else:
                method, arguments = pipe.recv()
                value = getattr(served, method)(*arguments)
        except EOFError:
            return
        except Exception:
            pipe.send((traceback.format_exc(), None))
            if served is None:
                return
        else:
            pipe.send((None, value))
