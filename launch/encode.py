"""Encodes a data set with a model's autoencoder and text encoder: the first stage of every attribution.

python -m launch.encode --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji
"""

from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.data.sources import open_dataset
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.root import StageRoot
from launch import common


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    with lock(common.WORKDIR.value):
        data = Attributor(pipeline, dataset, StageRoot(common.WORKDIR.value)).data
    print(f"{len(data)} pictures and {len(data.text)} captions encoded in {common.WORKDIR.value}")


if __name__ == "__main__":
    common.run(main)
