"""Encodes a data set with a model's autoencoder and text encoder: the first stage of every attribution.

python -m launch.encode --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji
"""

from collections.abc import Sequence

from absl import app

from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common


def main(argv: Sequence[str]) -> None:
    with common.command(argv, many_hosts=True):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        pipeline = common.load_model()
        dataset = common.load_dataset(image_resolution(pipeline))
        with lock(common.workdir()):
            data = Run(pipeline, dataset, StageRoot(common.workdir()), common.encode_config()).data
        skipped = f", {len(data.skipped)} images skipped" if data.skipped else ""
        print(f"{len(data)} images and {len(data.text)} captions encoded in {common.workdir()}{skipped}")


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
