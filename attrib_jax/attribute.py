"""The main job: queries in, scores and files out.

context -> queries -> method -> outputs. What a method does is in `attrib_jax/methods/`, one file each.
"""

import contextlib
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.types import Scores
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import EncodeConfig
from attrib_jax.jobs.query import (
    Query,
    check_query_name,
    prepare_query,
    query_mask,
    query_name,
    query_settings,
)
from attrib_jax.jobs.settings import RegionSettings
from attrib_jax.methods import METHODS, check_method, method_config, method_inputs, queries_per_pass
from attrib_jax.methods.base import Attribution, Method, MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import num_hosts, run_on_host0
from attrib_jax.storage.score_files import read_result, write_result
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock


def attribute(
    pipeline: Pipeline,
    dataset: Dataset,
    query: Query,
    config: MethodConfig | None = None,
    workdir: str | os.PathLike | None = None,
    shipped: str | os.PathLike | None = None,
    encode_config: EncodeConfig = EncodeConfig(),
) -> Scores:
    """Scores every image of `dataset` by its influence on `query`.

    Args:
      pipeline: see `load_pipeline`.
      dataset: its training images, see `open_dataset`.
      query: a prompt to generate from, or an image with its prompt.
      config: config of a method, such as `UnlearnConfig(step_size=0.1)` or `method_config("trak")`; attribution by
        unlearning with its defaults if None.
      workdir: keeps the stages for further queries; a temporary folder if None, on one host.
      shipped: folder of finished stages that came with the model, such as `models/openmoji/stages`.
      encode_config: how images and captions are encoded.

    Raises:
      ValueError: an argument is out of range.
      StorageError: the workdir holds stages of another model or data set, is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if workdir is None:
            if num_hosts() > 1:
                raise ValueError("workdir is None; several hosts need a folder that all of them share")
            workdir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(lock(workdir))
        run = Run(pipeline, dataset, StageRoot(workdir, shipped), encode_config)
        return attribute_queries(run, [query], config or method_config())[0].scores


def attribute_queries(
    run: Run,
    queries: Sequence[Query],
    config: MethodConfig,
    names: Sequence[str | None] | None = None,
    method: Method | None = None,
) -> list[Attribution]:
    """Attributes queries together: the method scores all of them, in as few passes over the data set as it can.

    Every query has a folder of its own, the same as if it were attributed alone, and is resumed or reused there
    whichever others came with it. Exact scores are bitwise those of the query alone; linearised ones of several queries
    are computed in another way than one's and agree with it up to rounding.

    Args:
      run: model, data set and workdir; hold the lock of the workdir.
      queries: at least one.
      config: config of the method.
      names: names of their folders, None for one made from the query and the settings; None for that throughout.
      method: the entry of a method that is not in the registry, such as that of an index.

    Raises:
      ValueError: there is no query, or two have one name; whatever is wrong with a query or the config.
    """
    check_method(run, config, method)
    entry = method or METHODS[config.method]
    names = [None] * len(queries) if names is None else list(names)
    if not queries or len(names) != len(queries):
        raise ValueError(f"queries has {len(queries)} and names {len(names)}; expected at least one, and as many")
    for name in names:
        if name is not None:
            check_query_name(name)

    # Queries: drawn by the model or read, then encoded.
    run.timings = {}
    with run.timed("query"):
        mesh = run.mesh(next((part for part in (config, *config.parts) if hasattr(part, "model_parallel")), config))
        prepared = [prepare_query(run.pipeline, run.predict, query, mesh) for query in queries]
    for part in (config, *config.parts):
        if isinstance(part, RegionSettings):
            # Before anything is stored: a wrong region should leave nothing behind.
            for each in prepared:
                query_mask(each, part)
    shared = config.describe()
    settings = [{"query": query_settings(query), **shared} for query in queries]
    folders = [name or query_name(query, own) for name, query, own in zip(names, queries, settings)]
    repeated = sorted({name for name in folders if folders.count(name) > 1})
    if repeated:
        places = [place for place, name in enumerate(folders, start=1) if name == repeated[0]]
        raise ValueError(
            f"queries number {', '.join(map(str, places))} have one name, {repeated[0]!r}; expected a name for each. "
            "Name them, or leave out the repeated ones."
        )

    with contextlib.ExitStack() as stack:
        # A folder for each query, which holds what is stored of it so far.
        inputs = method_inputs(run, config, method)
        jobs, stages, results = [], {}, {}
        for name, own, each in zip(folders, settings, prepared):
            remedy = f"Give another --query_name than {name!r}, or delete {run.root.workdir / 'attribution' / name}."
            stages[name] = stack.enter_context(run.root.stage(f"attribution/{name}", own, inputs, remedy))
            jobs.append(QueryJob(name, own, each, stages[name].path))

        def finish(job: QueryJob, scored: Scored) -> None:
            timings = dict(run.timings)
            results[job.name] = Attribution(job.name, job.folder, *scored, job.prepared, timings, len(jobs))

        # What an earlier run has finished.
        for job in jobs:
            began = time.monotonic()
            stored = read_result(job.folder / "scores.npz") if stages[job.name].finished else None
            if stored is not None:
                run.timings["scores"] = (round(time.monotonic() - began, 2), True)
                finish(job, Scored(*stored))

        # The method scores the others.
        pending = [job for job in jobs if job.name not in results]
        size = queries_per_pass(run, config)
        for first in range(0, len(pending), size):
            group = pending[first : first + size]
            for job, scored in zip(group, entry.score(run, group, config)):
                run_on_host0(functools.partial(write_result, job.folder / "scores.npz", *scored))
                stages[job.name].finish()
                finish(job, scored)
    return [results[job.name] for job in jobs]


def attribute_to_files(
    pipeline: Pipeline,
    dataset: Dataset,
    queries: Sequence[Query],
    config: MethodConfig,
    root: StageRoot,
    encode_config: EncodeConfig = EncodeConfig(),
    names: Sequence[str | None] | None = None,
    *,
    model_name: str,
    model_credit: str | None = None,
    top_k: int = 24,
    flags: Mapping[str, Any] | None = None,
    began: float | None = None,
    method: Method | None = None,
) -> list[Attribution]:
    """Attributes queries and writes their reports, see `attribute_queries` and `write_outputs`.

    Args:
      pipeline, dataset, encode_config: as in `attribute`.
      queries, config, names: as in `attribute_queries`.
      root: workdir and the stages that came with the model.
      model_name, model_credit, top_k: as in `write_outputs`.
      flags: the flags of the run, kept in manifest.json.
      began: `time.monotonic()` when the command began; now if None.
      method: as in `attribute_queries`.
    """
    # Reports need libraries for pages and plots, which scores do not.
    from attrib_jax.report.outputs import write_outputs

    began = time.monotonic() if began is None else began
    with lock(root.workdir):
        run = Run(pipeline, dataset, root, encode_config)
        results = attribute_queries(run, queries, config, names, method)
        for query, result in zip(queries, results):
            record = {"flags": dict(flags or {}), "seconds": time.monotonic() - began}
            write_outputs(
                result, dataset, query, config,
                model_name=model_name, model_credit=model_credit, top_k=top_k, record=record,
            )  # fmt: skip
    return results


class Attributor(Run):
    """Deprecated name of `Run`, with `attribute_queries` as methods."""

    def __init__(self, *args: Any, **kwargs: Any):
        warnings.warn("Attributor is deprecated: use Run and attribute_queries", DeprecationWarning, stacklevel=2)
        super().__init__(*args, **kwargs)

    def attribute(self, query: Query, config: MethodConfig | None = None, name: str | None = None) -> Attribution:
        """Attributes one query."""
        return attribute_queries(self, [query], config or method_config(), [name])[0]

    def attribute_many(
        self,
        queries: Sequence[Query],
        config: MethodConfig | None = None,
        names: Sequence[str | None] | None = None,
    ) -> list[Attribution]:
        """Attributes queries together."""
        return attribute_queries(self, queries, config or method_config(), names)
