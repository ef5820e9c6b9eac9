"""Training checkpoints with orbax: committed whole or not at all, checksummed, the newest few kept.

The checksums are kept by hand, because orbax restores an array with a flipped bit without an error.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from attrib_jax.storage.files import StorageError, make_folder

_log = logging.getLogger(__name__)


class TrainingCheckpoints:
    """The checkpoints of one training run, in `path`.

    `save` returns when the checkpoint is complete under its final name, so that a run killed at any moment restarts
    from the last step for which `save` returned. orbax commits by rename but does not notice a flipped bit, so
    checksums of all leaves are stored beside the state, and a damaged checkpoint is set aside for the one before it.
    Leaves are fully replicated arrays, numpy arrays, typed keys or numbers. Use as a context manager, or call `close`.
    """

    def __init__(self, path: str | os.PathLike, keep: int = 2):
        """Opens the folder, creating it if absent; the newest `keep` (>= 1) checkpoints are kept."""
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1 checkpoint")
        self.path = make_folder(path).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception_info) -> None:
        self.close()

    def close(self) -> None:
        """Releases orbax's threads."""
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest stored step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Stores the pytree `state` as `step`; a step that is stored already is left as it is.

        Raises StorageError where the checkpoint cannot be written: the earlier ones are then still there.
        """
        if step in self._manager.all_steps():
            _log.info("checkpoint %d is stored already in %s", step, self.path)
            return
        leaves = _describe(state, checksums=True)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            leaves=ocp.args.JsonSave(leaves),
            checksum=ocp.args.JsonSave({"crc32": _checksum(leaves)}),
        )
        if jax.process_index() == 0:
            # What a killed save left. Here and not on opening, since a reader may open the folder beside a writer.
            for leftover in self.path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise StorageError(
                f"cannot write checkpoint {step} in {self.path}: {_first_line(error)}. The earlier checkpoints are "
                "unchanged; make room or choose a writable folder, then start the same command again to resume."
            ) from error

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """The newest undamaged `(step, state)`, or None if nothing is stored.

        `like` is a pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and placement wanted.
        Raises ValueError listing both sides where the stored leaves differ from those of `like`, StorageError where
        checkpoints are stored but all are damaged.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                leaves = self._read_leaves(step)
            except Exception as error:  # noqa: BLE001 orbax raises bare Exceptions for unreadable arrays
                damaged[step] = _first_line(error)
                continue
            self._check_leaves(step, leaves, _describe(like))
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            try:
                state = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
                ).state
            except Exception as error:  # noqa: BLE001 orbax raises bare Exceptions for unreadable arrays
                damaged[step] = _first_line(error)
                continue
            wrong = [name for name, leaf in _describe(state, checksums=True).items() if leaf != leaves[name]]
            if wrong:
                damaged[step] = f"the checksum of {', '.join(wrong)} does not match"
                continue
            self._set_aside(damaged)
            return step, state
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise StorageError(
                f"no checkpoint in {self.path} can be read ({reasons}). Delete the folder to train from the start."
            )
        return None

    def _read_leaves(self, step: int) -> dict:
        """The description of a checkpoint's leaves; ValueError where it is not what was stored."""
        names = ("leaves", "checksum")
        items = self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in names}))
        if items.checksum != {"crc32": _checksum(items.leaves)}:
            raise ValueError("the checksum of its description does not match")
        return items.leaves

    def _check_leaves(self, step: int, stored: dict, expected: dict) -> None:
        """Raises ValueError where names, shapes or dtypes differ; orbax would cast a dtype without a word."""
        lines = []
        for name in sorted(stored.keys() | expected.keys()):
            sides = [
                f"{tuple(side[name]['shape'])} {side[name]['dtype']}" if name in side else "absent"
                for side in (stored, expected)
            ]
            if sides[0] != sides[1]:
                lines.append(f"  {name}: found {sides[0]}, expected {sides[1]}")
        if lines:
            raise ValueError(
                f"checkpoint {step} in {self.path} belongs to another model or optimiser:\n" + "\n".join(lines) + "\n"
                "Use the settings that it was made with, another --workdir, or delete the folder."
            )

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Renames damaged checkpoints, now that an earlier one is known to be good, so that they can be saved again."""
        for step, reason in damaged.items():
            _log.warning("checkpoint %d in %s is damaged (%s); resuming from an earlier one", step, self.path, reason)
            if jax.process_index() == 0:
                number = 0
                while (target := self.path / f"damaged-{step}-{number}").exists():
                    number += 1
                (self.path / str(step)).rename(target)
        if damaged:
            self._manager.reload()


@contextlib.contextmanager
def preemption_requested() -> Iterator[Callable[[], bool]]:
    """A block in which SIGTERM, sent before a machine is taken away, ends nothing; yields a function that reports it.

    A loop calls the function after every step, stores its state and raises. A signal that it has not reported takes
    effect when the block ends. The block has no effect, and the function returns False, outside the main thread, with
    several hosts (one of them could not store alone), and where the signal is ignored or handled by code other than
    Python's.
    """
    previous = signal.getsignal(signal.SIGTERM)
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if not alone or previous in (None, signal.SIG_IGN):
        yield lambda: False
        return
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if received:
        signal.raise_signal(signal.SIGTERM)


def stopped_by_sigterm(step: int, path: str | os.PathLike) -> InterruptedError:
    """The error that ends a training run whose `step` was stored after SIGTERM."""
    return InterruptedError(
        f"stopped by SIGTERM at step {step}, which is stored in {path}; start the same command again to resume"
    )


def _first_line(error: Exception) -> str:
    """The start of a message: orbax's run over pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checksum(leaves: dict) -> int:
    return zlib.crc32(json.dumps(leaves, sort_keys=True).encode())


def _describe(tree: Any, checksums: bool = False) -> dict[str, dict]:
    """Shape, dtype and, with `checksums`, crc32 of every leaf, by its path joined with `/`."""
    described = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        entry: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if checksums:
            values = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            entry["crc32"] = zlib.crc32(np.ascontiguousarray(values).tobytes())
        described[jax.tree_util.keystr(path, simple=True, separator="/")] = entry
    return described
