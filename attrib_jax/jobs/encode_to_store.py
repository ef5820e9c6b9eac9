"""Filling a store of arrays: batches are read ahead, encoded on all devices, and written chunk by chunk.

Of several hosts, each fills chunks of its own with its own devices: they share nothing but the folder.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from attrib_jax.core.checks import nonfinite_rows
from attrib_jax.parallel.hosts import host0_first, host_index, independent_hosts, num_hosts
from attrib_jax.parallel.mesh import data_mesh, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.joined import JoinedArray

_MAX_ROWS_PER_CHUNK = 1024
_CHUNK_BYTES = 2**26


def make_store(
    path: str | os.PathLike,
    field: str,
    shape: tuple[int, ...],
    dtype: str,
    num_rows: int,
    more: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
) -> ChunkStore:
    """A store in `<path>/<field>/`, `shape` the shape of a row; its chunks have at most 64 MiB of `field`.

    `more` are further fields that are written with it, each its row's shape and its dtype.
    """
    row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    rows = min(_MAX_ROWS_PER_CHUNK, max(1, _CHUNK_BYTES // row_bytes))
    fields = {field: (shape, np.dtype(dtype))}
    fields |= {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in (more or {}).items()}
    return host0_first(lambda: ChunkStore(path, fields, num_rows, rows, name=field))


def encode_to_store(
    store: ChunkStore,
    encode_tile: Callable[..., jax.Array],
    shared: Any,
    read: Callable[[np.ndarray], tuple[Any, dict[int, str]]],
    tile: int,
    description: str,
    unit: str,
    workers: int = 0,
    store_skipped: Callable[[slice, dict[int, str]], None] | None = None,
    static: tuple = (),
    name_row: Callable[[int, np.ndarray], str] | None = None,
) -> dict[str, JoinedArray]:
    """Computes the missing chunks of a store and returns the whole of each field, on disk.

    With several hosts, host 0 decides what is missing, the chunks are dealt out in turn, and all wait for all; an error
    of one is then raised on every host.

    Args:
      store: from `make_store`.
      encode_tile: `(*static, shared, batch) -> (rows, ...)`, or a dict of these by field where the store has several;
        run on one tile on every device.
      shared: what every device holds whole, such as parameters.
      read: rows (R,) of a tile on all devices -> the batch, leaves (R, ...), and the reasons of rows that could not be
        read, which are stored as zeros. Called from several threads or, with `workers`, processes.
      tile: rows that one device takes at a time.
      description, unit: of the progress bar.
      workers: processes that read; 0 for threads of this one.
      store_skipped: called with the rows of a chunk and its reasons, before the chunk is written.
      static: hashable first arguments of `encode_tile`, such as the model.
      name_row: (row, its value) -> what an error about that value calls it; its position if None.

    Raises:
      ValueError: values of a row are NaN or infinite in the store's dtype.
    """
    missing = store.pending_chunks()
    mine = missing[host_index() :: num_hosts()]
    with independent_hosts():
        if mine:
            done = store.num_rows - sum(store.rows(chunk).stop - store.rows(chunk).start for chunk in missing)
            run = _compiled(encode_tile, static, data_mesh(jax.local_devices()))
            _fill(store, mine, done, run, shared, read, tile, description, unit, workers, store_skipped, name_row)
    return {field: store.array(field) for field in store.fields}


def _fill(store, chunks, done, run, shared, read, tile, description, unit, workers, store_skipped, name_row) -> None:
    """Computes `chunks` on this host's devices; `done` counts the rows that are stored already."""
    mesh = data_mesh(jax.local_devices())
    shared = replicate(mesh, shared)
    # Tiles never reach over the end of a chunk, so that a resumed run has the tiles of an uninterrupted one.
    tiles, counts = [], {}
    for chunk in chunks:
        rows = np.arange(store.num_rows)[store.rows(chunk)]
        cut, _ = padded_tiles(len(rows), tile * mesh.size)
        tiles.extend(rows[cut])
        counts[chunk] = len(cut)
    batches = grain.MapDataset.source(tiles).map(read)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():
            # Grain's worker processes take its own flags from absl, which only programs of absl have parsed.
            flags.FLAGS.mark_as_parsed()
        # Through pipes: Grain's blocks of shared memory outlive an error, and containers have little room for them.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, options)
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    # Of several hosts, the first shows its own share.
    total = done + sum(store.rows(chunk).stop - store.rows(chunk).start for chunk in chunks)
    with contextlib.closing(iter(batches)) as reader, progress(total, description, unit, initial=done) as bar:
        for chunk in chunks:
            rows, results = store.rows(chunk), []
            reasons: dict[int, str] = {}
            size = rows.stop - rows.start
            for number in range(counts[chunk]):
                batch, unreadable = next(reader)
                results.append(run(shared, shard_batch(mesh, batch)))
                reasons |= unreadable
                bar.update(min(tile * mesh.size, size - number * tile * mesh.size))
            values = {}
            for field, (_, dtype) in store.fields.items():
                parts = [result[field] if isinstance(result, dict) else result for result in results]
                values[field] = np.concatenate([np.asarray(part) for part in parts])[:size].astype(dtype)
                for row in reasons:
                    values[field][row - rows.start] = 0
                _check_finite(values[field], rows, description, unit, name_row)
            if store_skipped is not None:
                # Before the chunk: once that is there, nobody reads its images again.
                store_skipped(rows, reasons)
            store.write(chunk, values)


@functools.lru_cache(maxsize=4)
def _compiled(encode_tile: Callable[..., jax.Array], static: tuple, mesh: Mesh):
    """Made once: other weights of the same architecture compile nothing."""
    return tile_map(mesh, functools.partial(encode_tile, *static))


def _check_finite(values: np.ndarray, rows: slice, description: str, unit: str, name_row) -> None:
    broken = nonfinite_rows(values)
    if not len(broken):
        return
    # One row is to blame on its content or on a range too small for it, all rows on the model.
    if len(broken) == len(values) > 1:
        which, advice = f"every {unit} from position {rows.start} to {rows.stop - 1}", "look for a damaged model"
    else:
        first = int(broken[0])
        which = f"{unit} at position {rows.start + first}"
        if name_row is not None:
            which = name_row(rows.start + first, values[first])
        if len(broken) > 1:
            which += f" and {len(broken) - 1} more"
        advice = f"take that {unit} out of the data set, or look for damage in the model"
    if values.dtype == np.float16:
        advice = "keep float32, whose range is larger, or " + advice
    raise ValueError(f"{description}: {which} gives NaN or infinity as {values.dtype.name}; {advice}")
