"""How scores change when latents and text states are stored in float16.

python -m benchmarks.store_dtype --model=models/openmoji --workdir=runs/store_dtype
"""

from pathlib import Path

import numpy as np
import scipy.stats
from absl import flags

from attrib_jax.attribute import attribute_queries
from attrib_jax.core.types import ranking
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import STORE_DTYPES, EncodeConfig
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_ROWS = flags.DEFINE_integer("rows", 1000, "Random training images to score.", lower_bound=100)
_FISHER = flags.DEFINE_string(
    "fisher", "models/openmoji/stages/fisher/cross-attn-kv-16384-seed0", "Fisher information, the same for both."
)
_PROMPTS = flags.DEFINE_list("prompts", ["woman astronaut", "handshake light skin tone"], "Queries.")


def main():
    common.require(workdir=common.workdir())
    pipeline, whole = common.load_model(), common.load_dataset()
    rows = np.sort(np.random.default_rng(0).permutation(len(whole))[: _ROWS.value])
    images = np.stack([whole[int(row)].image for row in rows])
    dataset = ArrayDataset(images, [whole.captions(int(row)) for row in rows], whole.row_ids[rows])
    config = method_config(fisher=_FISHER.value, num_examples=len(whole))
    print("| query | Spearman | top-100 overlap | largest difference / largest score |\n|---|---|---|---|")
    for prompt in _PROMPTS.value:
        query, scores = Query(prompt=prompt, guidance_scale=2.0), {}
        for dtype in STORE_DTYPES:
            workdir = Path(common.workdir()) / dtype
            with lock(workdir):
                run = Run(pipeline, dataset, StageRoot(workdir), EncodeConfig(dtype=dtype))
                scores[dtype] = attribute_queries(run, [query], config)[0].scores.score
        full, half = (scores[dtype] for dtype in STORE_DTYPES)
        spearman = scipy.stats.spearmanr(full, half).statistic
        top = (ranking(each, dataset.row_ids)[:100] for each in (full, half))
        overlap = len(np.intersect1d(*top)) / 100
        difference = np.abs(half - full).max() / np.abs(full).max()
        print(f"| {prompt} | {spearman:.6f} | {overlap:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    common.run(main)
