"""Attribution that moves the factors of a LoRA alone."""

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert.adapters.lora import attach_lora
from attrib_jax.core.weights import flatten_names
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.storage.files import read_arrays
from attrib_jax.storage.stage_root import StageRoot
from tests.convert.files import save

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2"
QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
SHARED = {"weights": "lora", "stride": 500, "flips": "none"}


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("lora"), np.random.default_rng(0)
    factors = {
        f"unet.{BLOCK}.{name}.lora_{side}.weight": 0.2 * rng.normal(size=size).astype(np.float32)
        for name in ("to_k", "to_out.0")
        for side, size in (("A", (2, 32)), ("B", (32, 2)))
    }
    apart = attach_lora(pipeline, save(factors, folder / "lora.safetensors"))
    return Run(apart, dataset, StageRoot(folder / "work"))


def test_unlearning_moves_the_factors_alone_and_its_scores_are_those_of_their_derivative(run):
    settings = SHARED | {"query_draws": 32, "fisher_samples": 64, "steps": 1}
    exact, linear = (
        attribute_queries(run, [QUERY], method_config("unlearn", score=score, step_size=1e-4, **settings), [score])[0]
        for score in ("exact", "linear")
    )
    moved = read_arrays(exact.folder / "unlearned.safetensors")[0]
    selected, _ = run.select("lora")
    assert moved.keys() == flatten_names(selected).keys() and len(moved) == 4
    assert all(np.any(leaf != flatten_names(selected)[name]) for name, leaf in moved.items())
    assert np.corrcoef(exact.scores.score, linear.scores.score)[0, 1] > 0.99
