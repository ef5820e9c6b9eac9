"""Fits the diagonal Fisher information of a weight subset over a data set.

python -m launch.fisher --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji --fisher_samples=16384
"""

from absl import flags

from attrib_jax.core.weights import count_weights
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.encode import picture_resolution
from attrib_jax.stages.root import StageRoot
from launch import common

_WEIGHTS = flags.DEFINE_string("weights", "cross-attn-kv", "Weight subset.")
_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Per-sample gradients to average.")
_SEED = flags.DEFINE_integer("loss_seed", 0, "Seeds the samples.")


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    config = AttributeConfig(weights=_WEIGHTS.value, fisher_samples=_SAMPLES.value, loss_seed=_SEED.value)
    pipeline = common.load_model()
    dataset = common.load_dataset(picture_resolution(pipeline))
    with lock(common.WORKDIR.value):
        attributor = Attributor(pipeline, dataset, StageRoot(common.WORKDIR.value), common.encode_config())
        fisher = attributor.fisher(config.weights, config.fisher_samples, config.loss_seed)
    count = count_weights(fisher.tree)
    print(f"Fisher information of {count.values} values in {count.matrices} matrices in {common.WORKDIR.value}/fisher")


if __name__ == "__main__":
    common.run(main)
