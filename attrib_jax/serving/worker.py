"""One thread that owns the device: requests wait in a queue, tell how far they are, and can be cancelled."""

import contextvars
import functools
import itertools
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from attrib_jax.parallel.progress import observed

_log = logging.getLogger(__name__)

# Results that are kept for those who asked, and for how many seconds.
_KEPT, _SECONDS = 400, 900.0
MAX_WAITING = 256


class BusyError(RuntimeError):
    """Too many requests wait."""


class Cancelled(Exception):
    """The request was cancelled."""


class Request:
    """A piece of work and how far it is.

    Attributes:
      name: random, known to whoever asked alone.
      state: `waiting`, `running`, `done`, `failed` or `cancelled`.
      progress: (what is being done, share of it), while it runs.
      result: what the work returned.
      error: what a user should read of its failure.
      internal: whether the failure is the server's.
    """

    def __init__(self, work: Callable[[], Any], number: int):
        self.name, self.number, self.work = secrets.token_urlsafe(16), number, work
        self.state = "waiting"
        self.progress: tuple[str, float] = ("", 0.0)
        self.result: Any = None
        self.error, self.internal = "", False
        self.finished: float | None = None
        self.done = threading.Event()
        self.cancelled = threading.Event()


class Worker:
    """Does one request after another in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_waiting: int = MAX_WAITING):
        self._clock, self._max_waiting = clock, max_waiting
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._waiting: list[Request] = []
        self._running: Request | None = None
        self._changed, self._stopped = threading.Condition(), False
        self._numbers = itertools.count()
        # Matmul precision and other contexts of whoever makes the worker.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._loop,), daemon=True, name="device")
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> Request:
        """Puts work at the end of the queue. Raises BusyError where it is full."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already; try again in a while")
            request = Request(work, next(self._numbers))
            self._requests[request.name] = request
            self._waiting.append(request)
            self._forget()
            self._changed.notify()
        return request

    def find(self, name: str) -> Request | None:
        """The request of this name; None where there is none, or it has been forgotten."""
        with self._changed:
            self._forget()
            return self._requests.get(name)

    def drop(self, request: Request) -> None:
        """Forgets a request and its result."""
        with self._changed:
            self._requests.pop(request.name, None)

    def position(self, request: Request) -> int:
        """How many requests come before this one, the running one included."""
        with self._changed:
            if request not in self._waiting:
                return 0
            return self._waiting.index(request) + (self._running is not None)

    def cancel(self, request: Request) -> None:
        """Ends a request that waits, or one that runs as soon as it looks up."""
        with self._changed:
            request.cancelled.set()
            if request in self._waiting:
                self._waiting.remove(request)
                self._finish(request, "cancelled")

    def close(self) -> None:
        """Cancels all requests and ends the thread."""
        with self._changed:
            self._stopped = True
            waiting = [*self._waiting, *([self._running] if self._running else [])]
        for request in waiting:
            self.cancel(request)
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=60)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                request = self._running = self._waiting.pop(0)
                request.state = "running"
            state = "done"
            try:
                with observed(functools.partial(_look_up, request)):
                    request.result = request.work()
            except Cancelled:
                state = "cancelled"
            except (ValueError, KeyError, OSError) as error:
                state, request.error = "failed", str(error.args[0] if isinstance(error, KeyError) else error)
            except Exception:
                _log.exception("a request failed")
                state, request.internal = "failed", True
                request.error = "something went wrong on the server, whose log says what; other requests go on"
            with self._changed:
                self._running = None
                self._finish(request, state)

    def _finish(self, request: Request, state: str) -> None:
        request.state, request.finished = state, self._clock()
        request.work = _nothing  # and what it holds, such as an image
        request.done.set()

    def _forget(self) -> None:
        now = self._clock()
        old = [(each.name, each.finished) for each in self._requests.values() if each.finished is not None]
        for place, (name, finished) in enumerate(old):
            if len(old) - place > _KEPT or now - finished > _SECONDS:
                del self._requests[name]


def _nothing() -> None:
    return None


def _look_up(request: Request, text: str, done: int, total: int) -> None:
    if request.cancelled.is_set():
        raise Cancelled
    request.progress = (text, done / total if total else 0.0)
