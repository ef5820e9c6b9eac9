"""Failures made on purpose: interrupted writes of chunks and states, and images that cannot be read."""

from collections.abc import Callable, Collection
from typing import Any

from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.state import StateStore


def interrupt_writes(patch, every: int) -> None:
    """Interrupts the program instead of every `every`-th write of a chunk."""
    write, count = ChunkStore.write, 0

    def failing(self, index, arrays):
        nonlocal count
        count += 1
        if count % every == 0:
            raise KeyboardInterrupt
        write(self, index, arrays)

    patch.setattr(ChunkStore, "write", failing)


def interrupt_states(patch, after: Collection[int]) -> None:
    """Interrupts the program after some of the states that it writes, counted from 1."""
    write, count = StateStore.write, 0

    def failing(self, tree, progress):
        nonlocal count
        write(self, tree, progress)
        count += 1
        if count in after:
            raise KeyboardInterrupt

    patch.setattr(StateStore, "write", failing)


def until_done(function: Callable[[], Any]) -> tuple[Any, int]:
    """Calls `function` again after every interruption -> its result, and how often it was interrupted."""
    interruptions = 0
    while True:
        try:
            return function(), interruptions
        except KeyboardInterrupt:
            interruptions += 1


class UnreadableImages:
    """A data set whose images at some positions cannot be read."""

    def __init__(self, dataset, rows: Collection[int], error: Callable[[int], Exception]):
        self._dataset, self._rows, self._error = dataset, rows, error

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        if index in self._rows:
            raise self._error(index)
        return self._dataset[index]
