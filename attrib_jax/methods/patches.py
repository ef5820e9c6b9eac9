"""Method `patches`: which training image's patches explain each patch of the query, without a model.

docs/METHOD.md, "Patches". Two passes over the latents for all queries: the first one adds up what every patch of the
query is normalised by, the second one takes the weights. Beside the scores each query's folder gets a map of its
regions, which the report shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.scores import make_scores
from attrib_jax.core.settings import setting
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.settings import FlipSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import fetch, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, host_share, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import stored_arrays, write_arrays

_MAP_FILE = "regions.safetensors"
# Images that a region of the map names.
_IMAGES_PER_REGION = 3
# Latent pixels, and images, that a device takes at once.
_TILE_PIXELS, _MAX_TILE = 2**15, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchesConfig(MethodConfig, FlipSettings):
    """Settings of patch attribution."""

    method: str = setting("patches", "Attribution method.", choices=("patches",))
    patch_sizes: tuple[float, ...] = setting(
        (1.0, 0.5, 0.25), "Sides of the patches, as shares of the latents' sides.", above=0, high=1
    )
    patch_widths: tuple[float, ...] = setting(
        (0.3,),
        "Noise levels that are averaged over, as shares of the median distance of training patches of the same size.",
        above=0,
        symbol="w",
    )
    patch_reach: float = setting(
        0.0,
        "How far from the place of the query's patch a training patch may lie, as a share of the latents' sides; 0 "
        "compares patches at the same place.",
        low=0,
        high=1,
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("patch_sizes", "patch_widths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}: expected one or more numbers, each once. Change {name}.")


def prepare(run: Run, config: PatchesConfig) -> None:
    """Nothing is shared but the encoded data set."""
    _ = run.data


def score(run: Run, queries: Sequence[QueryJob], config: PatchesConfig) -> list[Scored]:
    """Mean weight of each training image over sizes, noise levels and patches, in the optimal denoiser's softmax.

    The weights of all images, and mirror images where they are scored, add up to 1.
    """
    from attrib_jax.attribution import patches

    prepare(run, config)
    data, flips = run.data, config.num_flips
    shape, latents = data.latent_shape, np.stack([query.prepared.latents for query in queries])
    grids = patches.make_grids(shape, config.patch_sizes)
    with run.timed("patches"):
        medians = patches.median_patch_distances(data.latents, data.positions, grids)
        sigmas = (medians[:, None] * np.array(config.patch_widths)).astype(np.float32)
        offsets = patches.make_offsets(shape, config.patch_reach)
        readout = patches.make_readout(grids, len(config.patch_widths))
        mesh = data_mesh()
        comparison = latents.astype(np.float32), grids, sigmas, offsets
        with progress(2 * len(data) * flips, "compare patches", "image") as bar:
            # What the weights of every patch of the query add up to, one tile of images after another.
            total = np.full((len(queries), len(readout.matrix)), -np.inf)
            for _, values in _tiles(data, flips, mesh, _evidence, comparison, bar.update):
                total = np.logaddexp(total, np.logaddexp.reduce(values.astype(np.float64), axis=0))
            shared = comparison, total.astype(np.float32), readout.matrix
            weights = np.empty((len(data) * flips, len(queries), readout.matrix.shape[1]))
            for members, values in _tiles(data, flips, mesh, _weights, shared, bar.update):
                weights[members] = values
    weights = weights.reshape(len(data), flips, *weights.shape[1:])
    scored = []
    for place, query in enumerate(queries):
        own = weights[:, :, place]
        regions = patches.region_map(readout.boxes, own[..., 1:], data.row_ids, _IMAGES_PER_REGION)
        run_on_host0(functools.partial(write_arrays, query.folder / _MAP_FILE, regions._asdict(), {}))
        scored.append(Scored(make_scores(data.row_ids, own[..., 0], None, config.flips)))
    return scored


def read_region_map(folder: Path) -> dict[str, np.ndarray] | None:
    """The fields of a query's `RegionMap`; None where its folder has none."""
    return stored_arrays(folder / _MAP_FILE)


def _evidence(shared, images: jax.Array) -> jax.Array:
    """(B, Q, M) of B images and Q queries."""
    from attrib_jax.attribution.patches import patch_evidence

    queries, *others = shared
    return jnp.moveaxis(jax.lax.map(lambda query: patch_evidence(query, images, *others), queries), 0, 1)


def _weights(shared, images: jax.Array) -> jax.Array:
    """(B, Q, 1 + R), see `Readout`."""
    comparison, total, matrix = shared
    return jnp.exp(_evidence(comparison, images) - total) @ matrix


@functools.lru_cache(maxsize=4)
def _compiled(function: Callable[..., jax.Array], mesh: Mesh):
    return tile_map(mesh, function)


def _tiles(
    data: EncodedDataset,
    flips: int,
    mesh: Mesh,
    function: Callable[..., jax.Array],
    shared: Any,
    advance: Callable[[int], Any],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Results of every image and mirror image, a device's tile at a time -> (places (n,), values (n, ...)).

    A place is image x flips + flip. The tiles and their order do not depend on the number of devices.
    """
    height, width = data.latent_shape[:2]
    tile = max(1, min(_MAX_TILE, _TILE_PIXELS // (height * width)))
    program, shared = _compiled(function, mesh), replicate(mesh, shared)
    size = tile * mesh.size
    share = host_share(mesh, size)
    for members, mask in zip(*padded_tiles(len(data) * flips, size)):
        image, flip = np.divmod(members[share], flips)
        values = fetch(program(shared, shard_batch(mesh, data.views(image, flip))))
        for start in range(0, size, tile):
            span = slice(start, start + tile)
            count = int(mask[span].sum())
            if count:
                yield members[span][:count], values[span][:count]
        advance(int(mask.sum()))
