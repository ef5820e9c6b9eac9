"""Encodes a data set with a model's autoencoder and text encoder: the first stage of every attribution.

python -m launch.encode --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji
"""

from attrib_jax.attribute import Attributor
from attrib_jax.jobs.encode import picture_resolution
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline = common.load_model()
    dataset = common.load_dataset(picture_resolution(pipeline))
    with lock(common.WORKDIR.value):
        data = Attributor(pipeline, dataset, StageRoot(common.WORKDIR.value), common.encode_config()).data
    skipped = f", {len(data.skipped)} pictures skipped" if data.skipped else ""
    print(f"{len(data)} pictures and {len(data.text)} captions encoded in {common.WORKDIR.value}{skipped}")


if __name__ == "__main__":
    common.run(main)
