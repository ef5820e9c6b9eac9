"""The attribute command with chunks of four rows, in float32 or float64, for runs in real processes.

python -m tests.multihost.commands --model=... --workdir=... with any flags of launch.attribute
"""

import dataclasses
import time

import jax
import numpy as np
from absl import app, flags

import attrib_jax.jobs.draws
import attrib_jax.jobs.encode_to_store
import attrib_jax.jobs.losses
from attrib_jax.storage.state import StateStore
from launch import attribute, common

_DOUBLE = flags.DEFINE_boolean("float64", False, "Whether all is computed in float64.")
_PAUSE = flags.DEFINE_float("pause", 0.0, "Seconds that storing a state of the Fisher sum takes, to be killed in.")


def main(argv):
    if _DOUBLE.value:
        jax.config.update("jax_enable_x64", True)
        load_model = common.load_model

        def load_double(*given):
            pipeline = load_model(*given)
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pipeline.params)
            return dataclasses.replace(pipeline, params=params)

        common.load_model = load_double
    attribute.main(argv)


def _slow(write):
    def wrapped(self, *arguments):
        write(self, *arguments)
        time.sleep(_PAUSE.value)

    return wrapped


if __name__ == "__main__":
    attrib_jax.jobs.encode_to_store._MAX_ROWS_PER_CHUNK = 4
    attrib_jax.jobs.losses._ROWS_PER_CHUNK = 4
    attrib_jax.jobs.losses._TILES_PER_CHUNK = 0
    attrib_jax.jobs.draws._SAMPLES_PER_CPU = 8
    attrib_jax.jobs.draws.tiles_per_checkpoint = lambda mesh: 1
    StateStore.write = _slow(StateStore.write)
    common.adopt_shared_flags()
    app.run(main)
