"""Finds the training images that made one generated image possible.

python -m launch.attribute --flagfile=configs/quickstart.cfg
python -m launch.attribute --flagfile=configs/quickstart.cfg --prompt="handshake light skin tone" --seed=3
python -m launch.attribute --flagfile=configs/queries.cfg --queries=queries.jsonl
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from attrib_jax.attribute import attribute_to_files
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.context import load_divisible
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, read_stored_query
from attrib_jax.methods import METHODS, ensemble_parts, method_readers
from attrib_jax.methods.base import Attribution, MethodConfig, moved_weights
from attrib_jax.methods.features import default_tower
from attrib_jax.parallel.hosts import is_host0
from attrib_jax.storage.stage_root import StageRoot
from launch import common
from launch.flags import check_unread, define_choice, define_flags, define_mode_flags, read_config

_PROMPT = flags.DEFINE_string("prompt", None, "Caption of the query.")
_QUERY = flags.DEFINE_string("query", None, "Image to attribute, with --prompt; generated if not given.")
_QUERY_LATENTS = flags.DEFINE_string("query_latents", None, "Numpy file of queries as latents (Q, c, h, w).")
_QUERY_TEXT = flags.DEFINE_string("query_text", None, "Numpy file of their text states (Q, captions, tokens, width).")
_QUERY_INDEX = flags.DEFINE_integer("query_index", 0, "Index of the query in these files.", lower_bound=0)
_QUERIES = flags.DEFINE_string(
    "queries", None, "JSON Lines file of many queries: prompt, and maybe seed, image, name and guidance_scale."
)
_NAME = flags.DEFINE_string("query_name", None, "Folder name of the result; made from the prompt if not given.")
_METHOD = define_choice(
    "method",
    "unlearn",
    METHODS,
    "Attribution method: " + "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + ".",
)
_TOP_K = flags.DEFINE_integer("top_k", 24, "Images shown in the report, and rows of top.csv.", lower_bound=1)
_SHIPPED = flags.DEFINE_boolean(
    "use_shipped_stages", True, "Whether finished stages that came with the model are reused."
)
define_flags(Query)
define_mode_flags({name: method.config for name, method in METHODS.items()}, skip=["method"])
flags.mark_flags_as_mutual_exclusive(["query", "query_latents", "queries"])
flags.mark_flags_as_mutual_exclusive(["region", "region_mask"])


def main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    with common.command(argv, many_hosts=True):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        queries, names = _read_queries()
        config = _read_config()
        pipeline = load_divisible(lambda: common.load_model(moved_weights(config)), config)
        if not common.LATENTS_SCALED.value:
            scaled = pipeline.vae.config.scaled
            queries = [
                query if query.latents is None else dataclasses.replace(query, latents=scaled(query.latents))
                for query in queries
            ]
        dataset = common.load_dataset(image_resolution(pipeline))
        results = attribute_to_files(
            pipeline,
            dataset,
            queries,
            config,
            StageRoot(common.workdir(), common.shipped_stages() if _SHIPPED.value else None),
            common.encode_config(),
            names,
            model_name=common.MODEL.value,
            model_credit=common.model_credit(),
            top_k=_TOP_K.value,
            flags=common.own_flags("launch.attribute"),
            began=began,
        )
        if is_host0():
            for query, result in zip(queries, results):
                _print(query, result, dataset, named=len(results) > 1)


def _print(query: Query, result: Attribution, dataset: Dataset, named: bool) -> None:
    if named:
        print(f"{query.prompt} ({result.name})")
    top = result.scores.top(min(5, _TOP_K.value))
    for rank, (row, score) in enumerate(zip(top.row_id, top.score), start=1):
        position = int((dataset.row_ids == row).argmax())
        print(f"{rank:3d}  row {row:5d}  {score: .3e}  {dataset.captions(position)[0]}")
    print(f"report: {result.folder / 'report.html'}")


def _read_config() -> MethodConfig:
    """The config of the method, from the flags that it reads; of an ensemble those of its methods too."""
    method, names = _METHOD.value, tuple(flags.FLAGS.ensemble_methods or ())
    check_unread(f"method {method!r}", method_readers(method, names))
    parts = tuple(_read_method(name) for name in ensemble_parts(method, names))
    return _read_method(method, **({"parts": parts} if parts else {}))


def _read_method(method: str, **values: Any) -> MethodConfig:
    if "tower" in (fields := {field.name for field in dataclasses.fields(METHODS[method].config)}):
        values["tower"] = flags.FLAGS.tower or default_tower(method, common.DATASET.value)
    if "cascade_min" in fields and flags.FLAGS.cascade:
        # Every image that is shown has its full score.
        values["cascade_min"] = max(flags.FLAGS.cascade_min, _TOP_K.value)
    return read_config(METHODS[method].config, method=method, **values)


def _read_queries() -> tuple[list[Query], list[str | None]]:
    """The queries of the flags, and their names."""
    defaults = read_config(Query, prompt="")
    if _QUERIES.value is not None:
        single = {"prompt": _PROMPT, "query_text": _QUERY_TEXT, "query_name": _NAME}
        given = [f"--{name}" for name, flag in single.items() if flag.value]
        if given:
            raise ValueError(
                f"{', '.join(given)} given beside --queries, whose lines have prompts, images and names of their own; "
                "leave them out (--prompt= takes back that of a flagfile)"
            )
        from attrib_jax.jobs.query_file import read_queries

        return read_queries(_QUERIES.value, defaults)
    if _QUERY_INDEX.value and _QUERY_LATENTS.value is None:
        raise ValueError(f"query_index is {_QUERY_INDEX.value}, but there are no --query_latents to choose from")
    if _QUERY_TEXT.value is not None and _QUERY_LATENTS.value is None:
        raise ValueError(f"query_text is {_QUERY_TEXT.value!r} but query_latents is not given; give both")
    if _QUERY_TEXT.value is None:
        common.require(prompt=_PROMPT.value if _PROMPT.value is None else "given")
    if not (_PROMPT.value or _QUERY.value or _QUERY_LATENTS.value):
        # An own image may have an empty prompt; a generated one would be of nothing.
        raise ValueError("prompt is empty, and there is no image; give --prompt, --query, --query_latents or --queries")
    stored = {}
    if _QUERY_LATENTS.value is not None:
        stored = read_stored_query(_QUERY_LATENTS.value, _QUERY_TEXT.value, _QUERY_INDEX.value)
    query = dataclasses.replace(defaults, prompt=_PROMPT.value or "", image=_QUERY.value, **stored)
    return [query], [_NAME.value]


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
