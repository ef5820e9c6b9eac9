"""Fits the curvature of a weight subset over a data set: the diagonal Fisher information, or EKFAC.

python -m launch.fisher --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji --fisher_samples=16384
python -m launch.fisher --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji --curvature=ekfac

launch.attribute with the same --workdir, --weights, --curvature, --fisher_samples and --loss_seed reuses it, whatever
its damping.
"""

from absl import flags

from attrib_jax.attribute import Attributor
from attrib_jax.core.weights import WEIGHT_SUBSETS, count_weights
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.jobs.encode import picture_resolution
from attrib_jax.methods.config import CURVATURES, AttributeConfig
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_WEIGHTS = flags.DEFINE_string("weights", "cross-attn-kv", f"Weight subset: {', '.join(WEIGHT_SUBSETS)}.")
_CURVATURE = flags.DEFINE_string("curvature", "diagonal", f"What to fit: {', '.join(CURVATURES)}.")
_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Per-sample gradients to average.")
_SEED = flags.DEFINE_integer("loss_seed", 0, "Seeds the samples.")


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    config = AttributeConfig(
        weights=_WEIGHTS.value,
        curvature=_CURVATURE.value,
        fisher_samples=_SAMPLES.value,
        loss_seed=_SEED.value,
    )
    pipeline = common.load_model()
    dataset = common.load_dataset(picture_resolution(pipeline))
    with lock(common.WORKDIR.value):
        attributor = Attributor(pipeline, dataset, StageRoot(common.WORKDIR.value), common.encode_config())
        curvature = attributor.curvature(config)
    if isinstance(curvature, EKFAC):
        what, tree, folder = "EKFAC", curvature.eigenvalues.tree, "ekfac"
    else:
        what, tree, folder = "Fisher information", curvature.tree, "fisher"
    count = count_weights(tree)
    print(f"{what} of {count.values} values in {count.matrices} matrices in {common.WORKDIR.value}/{folder}")


if __name__ == "__main__":
    common.run(main)
