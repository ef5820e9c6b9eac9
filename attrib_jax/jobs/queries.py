"""Many queries: reading them from a file, and scoring them in one pass over the data set."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.core.paths import expand_path
from attrib_jax.core.text import read_text, split_lines
from attrib_jax.core.weights import merge_weights
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.identity import check_query_name
from attrib_jax.jobs.linear import weight_change
from attrib_jax.jobs.losses import dataset_values, pending_chunks, value_store
from attrib_jax.jobs.programs import ScorePrograms
from attrib_jax.jobs.query import Query
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.models.precision import cast_params
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.progress import progress

# Bytes of moved weights that lie on a device in one pass, where the number of queries is not given.
_BYTES_PER_PASS = 2**31

_LISTED = 10  # bad lines shown
# Keys of a line, and what their values have to be.
_KEYS = {"prompt": str, "seed": int, "image": str, "name": str, "guidance_scale": (int, float)}


class NamedQueries(NamedTuple):
    """The queries of a file, and the names of their folders, None where one is to be made from the query."""

    queries: list[Query]
    names: list[str | None]


def read_queries(file: str | os.PathLike, defaults: Query | None = None) -> NamedQueries:
    """Reads queries from a JSON Lines file.

    Each line is an object with `prompt`, and maybe `seed`, `image` (the path of a picture, relative to the file),
    `name` and `guidance_scale`; the rest is that of `defaults`, of a `Query` if None. Blank lines are skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: lines are no such objects, name a picture that does not exist, or have one name; or there is no query.
    """
    file = Path(expand_path(file))
    lines = split_lines(read_text(file))
    queries, names, problems = [], [], []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            query, name = _parse(line, file.parent, defaults or Query(prompt=""))
            if name is not None and first_line.setdefault(name, number) != number:
                raise ValueError(f"name {name!r} is that of line {first_line[name]} too; give each query its own")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        queries.append(query)
        names.append(name)
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError("\n  ".join([f"{file} has lines that are no queries:", *problems[:_LISTED], *more]))
    if not queries:
        raise ValueError(f'{file} has no queries; expected lines such as {{"prompt": "woman astronaut", "seed": 0}}')
    return NamedQueries(queries, names)


def _parse(line: str, folder: Path, defaults: Query) -> tuple[Query, str | None]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f'{line.strip()[:40]!r} is no object; expected one such as {{"prompt": "woman astronaut"}}')
    unknown = sorted(values.keys() - _KEYS.keys())
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    for key, value in values.items():
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kind = {str: "a string", int: "a whole number"}.get(_KEYS[key], "a number")
            raise ValueError(f"{key} is {value!r}; expected {kind}")
    if "prompt" not in values:
        raise ValueError("prompt is absent; every query needs one, if only an empty string")
    name = values.pop("name", None)
    if name is not None:
        check_query_name(name)
    if "image" in values:
        values["image"] = folder / values["image"]
        if not values["image"].is_file():
            raise ValueError(f"picture {os.fspath(values['image'])!r} does not exist; paths are relative to this file")
    return dataclasses.replace(defaults, **values), name


def queries_in_pass(config: AttributeConfig, selected: Any) -> int:
    """How many queries to score in one pass over the data set, `selected` being the weights that move."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(selected))
    return config.queries_per_pass or max(1, _BYTES_PER_PASS // size)


def query_values(
    paths: Sequence[Path],
    moved: Sequence[Any],
    config: AttributeConfig,
    programs: ScorePrograms,
    data: EncodedDataset,
    description: str,
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Losses under the moved weights of every query, or linearised scores, as `config.score` says.

    One pass over the data set. Losses are to the bit those of the query alone; for linearised scores see
    `linear_values`.

    Args:
      paths: a folder for each query; results are kept there in chunks, as `dataset_values` has them, and resumed.
      moved: the weights that unlearning each query gave.
      config: score, stride, captions, flips, seed and precision.
      programs: of the model.
      data: the encoded data set.
      description: of the progress.
      rows: positions in it, all of them if None; the caller keeps to one set of rows for one path.

    Returns:
      (N, flips) float64 for each query.
    """
    if config.score == "linear":
        selected = programs.selected(config)
        changes = [weight_change(tree, selected) for tree in moved]
        return linear_values(paths, changes, config, programs, data, description, rows)
    return _values(paths, moved, config, programs, data, description, rows)


def linear_values(
    paths: Sequence[Path],
    changes: Sequence[Any],
    config: AttributeConfig,
    programs: ScorePrograms,
    data: EncodedDataset,
    description: str,
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The derivatives of all losses along the weight change of every query; `config.score` has to be `linear`.

    One pass over the data set. Those of several queries are taken in reverse mode and differ from those of one in their
    last digits. `changes` are nested dicts like the selected weights; other arguments and results as in
    `query_values`.
    """
    return _values(paths, changes, config, programs, data, description, rows)


def _values(paths, weights, config: AttributeConfig, programs, data, description, rows) -> list[np.ndarray]:
    """`weights` are moved ones for exact scores, changes for linear ones."""
    linear, flips = config.score == "linear", config.num_flips
    if len(paths) == 1:
        program = programs.linear(config) if linear else programs.losses(config)
        weights = (programs.linear_weights if linear else programs.params)(config, weights[0])
        return [dataset_values(paths[0], program, weights, data, flips, config.captions, description, rows)]
    rows = np.arange(len(data)) if rows is None else np.asarray(rows)
    program, run = (_linear_pass if linear else _exact_pass)(weights, config, programs, data)
    stores = [value_store(path, len(rows), (flips,), program.mesh) for path in paths]
    missing = []
    for query, store in enumerate(stores):
        losses = None if linear else lambda some, query=query: run(some, [query], lambda count: None)[0]
        missing.append(pending_chunks(store, rows, losses))
    # Row range -> the (query, chunk) that lack it: queries may come from earlier runs, and with chunks of other sizes.
    lacking: dict[tuple[int, int], list[tuple[int, int]]] = collections.defaultdict(list)
    for query, chunks in enumerate(missing):
        for chunk in chunks:
            span = stores[query].rows(chunk)
            lacking[span.start, span.stop].append((query, chunk))
    counts = data.num_captions[rows] if config.captions == "all" else np.ones(len(rows), np.int64)
    forwards = flips * program.num_timesteps
    left = sum(
        int(counts[start:stop].sum()) * (1 if linear else len(members)) for (start, stop), members in lacking.items()
    )
    with progress(left * forwards, f"{description} of {len(paths)} queries", "forward") as bar:
        for (start, stop), members in sorted(lacking.items()):
            wanted = [query for query, _ in members]
            values = run(rows[start:stop], wanted, lambda count: bar.update(count * program.num_timesteps))
            for (query, chunk), result in zip(members, values):
                run_on_host0(functools.partial(stores[query].write, chunk, {"loss": result}))
    return [store.read_all()["loss"] for store in stores]


# (rows, queries, advance) -> the results (len(rows), flips) of each of these queries.
_Run = Callable[[np.ndarray, Sequence[int], Callable[[int], Any]], Sequence[np.ndarray]]


def _exact_pass(moved, config, programs, data) -> tuple[Any, _Run]:
    program = programs.losses(config)
    # The weights that no query moves lie on the devices once.
    rest = program.place(programs.rest(config))
    placed = [merge_weights(program.place(cast_params(tree, config.precision)), rest) for tree in moved]

    def run(rows, queries, advance):
        return [program(placed[query], data, rows, config.num_flips, config.captions, advance) for query in queries]

    return program, run


def _linear_pass(changes, config, programs, data) -> tuple[Any, _Run]:
    program = programs.linear(config, len(changes))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *changes)
    weights = program.place(programs.linear_weights(config, stacked))

    def run(rows, queries, advance):
        values = program(weights, data, rows, config.num_flips, config.captions, advance)
        return [np.ascontiguousarray(values[..., query]) for query in queries]

    return program, run
