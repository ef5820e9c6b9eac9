"""Trainings that are interrupted on purpose."""

import contextlib
from unittest import mock

from attrib_jax.storage.checkpoints import TrainingCheckpoints


@contextlib.contextmanager
def interrupted_after_saving(last: int):
    """Interrupts the program when a training has stored step `last`."""
    save = TrainingCheckpoints.save

    def failing(self, step, state):
        save(self, step, state)
        if step == last:
            raise KeyboardInterrupt

    with mock.patch.object(TrainingCheckpoints, "save", failing):
        yield
