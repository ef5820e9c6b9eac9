"""Progress of long loops on stderr: a bar on a terminal, an occasional line in a log."""

import sys
from collections.abc import Iterable
from typing import TextIO

import tqdm

from attrib_jax.parallel.hosts import is_host0

# Seconds between two lines where stderr is a file or a pipe: a log should not fill with redrawn bars.
_LOG_INTERVAL = 10.0


class _Lines:
    """Gives tqdm a stream without carriage returns: each redraw becomes a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(
    iterable_or_total: Iterable | int, description: str, unit: str = "it", initial: int = 0, total: int | None = None
) -> tqdm.tqdm:
    """Shows count, rate and time left of a loop.

    Given an iterable, iterate over the result; given a total, call `.update(n)` and use it as a context manager.
    `initial` counts what an earlier run had done, so that the rate is of this run alone. `total` is for iterables
    without a length. With several hosts, host 0 shows.
    """
    if isinstance(iterable_or_total, int):
        iterable, total = None, iterable_or_total
    else:
        iterable = iterable_or_total
    arguments = {"desc": description, "unit": unit, "initial": initial, "total": total, "disable": not is_host0()}
    if sys.stderr.isatty():
        return tqdm.tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **arguments)
    # miniters=1: the clock alone decides, whatever the rate was at the start, when compilation made it low.
    return tqdm.tqdm(
        iterable,
        file=_Lines(sys.stderr),
        mininterval=_LOG_INTERVAL,
        miniters=1,
        bar_format="{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} elapsed, {remaining} left",
        **arguments,
    )
