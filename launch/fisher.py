"""Fits the curvature of a weight subset over a data set: the diagonal Fisher information, or EKFAC.

python -m launch.fisher --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji --fisher_samples=16384
python -m launch.fisher --model=models/openmoji --dataset=openmoji --workdir=runs/openmoji --curvature=ekfac

launch.attribute with the same --workdir, --weights, --curvature, --fisher_samples and --loss_seed reuses it, whatever
its damping.
"""

from collections.abc import Sequence

from absl import app

from attrib_jax.core.weights import count_weights
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.jobs.context import Run, load_divisible
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.settings import CurvatureSettings
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import define_flags, read_config

define_flags(CurvatureSettings, skip=["damping", "ekfac_damping", "fisher"])


def main(argv: Sequence[str]) -> None:
    with common.command(argv, many_hosts=True):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        config = read_config(CurvatureSettings)
        pipeline = load_divisible(lambda: common.load_model([config.weights]), config)
        dataset = common.load_dataset(image_resolution(pipeline))
        with lock(common.workdir()):
            run = Run(pipeline, dataset, StageRoot(common.workdir()), common.encode_config())
            curvature = fit_curvature(run, config)
        if isinstance(curvature, EKFAC):
            what, tree, folder = "EKFAC", curvature.eigenvalues.tree, "ekfac"
        else:
            what, tree, folder = "Fisher information", curvature.tree, "fisher"
        count = count_weights(tree)
        print(f"{what} of {count.values} values in {count.matrices} matrices in {common.workdir()}/{folder}")


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
