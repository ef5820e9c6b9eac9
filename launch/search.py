"""Looks up in an index which training images a query owes most to, in milliseconds; --rerank makes the best ones exact.

python -m launch.search --flagfile=configs/search_openmoji.cfg --prompt="woman astronaut"
python -m launch.search --flagfile=configs/search_openmoji.cfg --query=picture.png --prompt="red hat" --rerank=100
python -m launch.search --flagfile=configs/search_openmoji.cfg --benchmark=100
"""

import dataclasses
import json
import time
from collections.abc import Sequence

from absl import app, flags

from attrib_jax.attribute import attribute_to_files
from attrib_jax.core.checks import expand_path
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.jobs.query_file import read_queries
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.parallel.hosts import is_host0
from attrib_jax.retrieval.index import StudentIndex, check_index, open_index
from attrib_jax.retrieval.search import SearchConfig, benchmark, index_method
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import check_unread, define_flags, read_config

_INDEX = flags.DEFINE_string("index", None, "Folder of the index; <workdir>/index if not given.")
_TOWER = flags.DEFINE_string("tower", None, "The student's tower, if it is not where it was when the index was made.")
_PROMPT = flags.DEFINE_string("prompt", None, "Caption of the query.")
_QUERY = flags.DEFINE_string("query", None, "Image to attribute, with --prompt; generated if not given.")
_QUERIES = flags.DEFINE_string(
    "queries", None, "JSON Lines file of many queries: prompt, and maybe seed, image, name and guidance_scale."
)
_NAME = flags.DEFINE_string("query_name", None, "Folder name of the result; made from the prompt if not given.")
_TOP_K = flags.DEFINE_integer("top_k", 24, "Images shown in the report, and rows of top.csv.", lower_bound=1)
_BENCHMARK = flags.DEFINE_integer(
    "benchmark", 0, "Number of searches to measure: prints one JSON line of latency and recall, and writes no result.",
    lower_bound=0,
)  # fmt: skip
define_flags(Query, SearchConfig, UnlearnConfig, skip=["method", "index"])
flags.mark_flags_as_mutual_exclusive(["query", "queries"])
flags.mark_flags_as_mutual_exclusive(["region", "region_mask"])

# Queries of a benchmark that names none.
_MEASURED = 16


def main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    with common.command(argv):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        folder = expand_path(_INDEX.value or f"{common.workdir()}/index")
        index = open_index(folder, _TOWER.value)
        config = _read_config(folder)
        queries, names = ([], []) if _BENCHMARK.value and _PROMPT.value is None else _read_queries()
        pipeline = common.load_model()
        dataset = common.load_dataset(image_resolution(pipeline))
        root = StageRoot(common.workdir(), common.shipped_stages())
        if _BENCHMARK.value:
            with lock(common.workdir()):
                run = Run(pipeline, dataset, root, common.encode_config())
                check_index(index, run)
                sampler = read_config(Query, prompt="")
                queries = queries or [
                    dataclasses.replace(sampler, prompt=dataset.captions(place * len(dataset) // _MEASURED)[0])
                    for place in range(_MEASURED)
                ]
                prepared = [prepare_query(run.pipeline, run.predict, query) for query in queries]
                print(json.dumps(benchmark(index, run, prepared, _BENCHMARK.value)))
            return
        if isinstance(index, StudentIndex):
            # A tower that does not fit should leave nothing behind.
            _ = index.features
        results = attribute_to_files(
            pipeline,
            dataset,
            queries,
            config,
            root,
            common.encode_config(),
            names,
            model_name=common.MODEL.value,
            model_credit=common.model_credit(),
            top_k=_TOP_K.value,
            flags=common.own_flags("launch.search"),
            began=began,
            method=index_method(index),
        )
        if is_host0():
            position = {int(row): place for place, row in enumerate(dataset.row_ids)}
            for query, result in zip(queries, results):
                if len(results) > 1:
                    print(f"{query.prompt} ({result.name})")
                top = result.scores.top(min(5, _TOP_K.value))
                for rank, (row, score) in enumerate(zip(top.row_id.tolist(), top.score.tolist()), start=1):
                    print(f"{rank:3d}  row {row:5d}  {score: .3e}  {dataset.captions(position[row])[0]}")
                print(f"report: {result.folder / 'report.html'}")


def _read_config(folder: str) -> SearchConfig:
    rerank = flags.FLAGS.rerank
    chosen = "rerank above 0" if rerank else "rerank 0"
    check_unread(chosen, {"rerank 0": (SearchConfig, Query), "rerank above 0": (SearchConfig, UnlearnConfig, Query)})
    parts = (read_config(UnlearnConfig, method="unlearn"),) if rerank else ()
    return read_config(SearchConfig, method="index", index=folder, parts=parts)


def _read_queries() -> tuple[list[Query], list[str | None]]:
    defaults = read_config(Query, prompt="")
    if _QUERIES.value is not None:
        given = [f"--{flag.name}" for flag in (_PROMPT, _NAME) if flag.value]
        if given:
            raise ValueError(
                f"{', '.join(given)} given beside --queries, whose lines have prompts and names of their own; leave "
                "them out (--prompt= takes back that of a flagfile)"
            )
        return read_queries(_QUERIES.value, defaults)
    common.require(prompt=_PROMPT.value if _PROMPT.value is None else "given")
    if not (_PROMPT.value or _QUERY.value):
        raise ValueError("prompt is empty, and there is no image; give --prompt, --query or --queries")
    return [dataclasses.replace(defaults, prompt=_PROMPT.value or "", image=_QUERY.value)], [_NAME.value]


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
