"""Progress of long loops on stderr: a bar on a terminal, an occasional line in a log."""

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import tqdm

from attrib_jax.parallel.hosts import is_host0

# Seconds between two lines where stderr is a file or a pipe: a log should not fill with redrawn bars.
_LOG_INTERVAL = 10.0


_observer: contextvars.ContextVar[Callable[[str, int, int], None] | None] = contextvars.ContextVar(
    "observer", default=None
)


@contextlib.contextmanager
def observed(observer: Callable[[str, int, int], None]) -> Iterator[None]:
    """A context in which `observer(description, done, total)` is called as the loops of this thread go on.

    It replaces what is shown on stderr. An exception that it raises ends the loop, which resumes as after a kill.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class _Observed(tqdm.tqdm):
    """A bar that an observer sees in the place of stderr."""

    def __init__(self, *args, observer: Callable[[str, int, int], None], **kwargs):
        super().__init__(*args, **kwargs, disable=True)
        self._observer, self._done, self._description = observer, kwargs["initial"], kwargs["desc"]
        # A bar that is disabled keeps no total.
        self._total = kwargs["total"] or 0

    def update(self, n=1):
        self._done += n
        self._observer(self._description, self._done, self._total)
        return True

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update(1)


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
    observer = _observer.get()
    if observer is not None:
        if total is None and iterable is not None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        return _Observed(iterable, desc=description, initial=initial, total=total, observer=observer)
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
