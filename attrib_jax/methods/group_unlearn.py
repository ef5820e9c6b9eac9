"""Method `group-unlearn`: unlearn each group of training images, then see what that costs the query.

A group is what the data set names, such as an artist (`Dataset.group_names`). The score of a group is the query's loss
under a model that has unlearned the group and retained the other images, less that under the model: what leaving the
group out of training would do, without training again (after GUDA, arXiv 2601.22651; docs/METHOD.md, "Groups"). The
unlearned models are a stage that all queries share.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.mirrored import noisy_timesteps
from attrib_jax.core.fingerprint import digest, json_digest
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import declared, setting
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import merge_weights, unflatten_names
from attrib_jax.data.protocol import named_groups
from attrib_jax.diffusion.losses import Predict, denoising_losses
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import text_states
from attrib_jax.jobs.settings import CaptionSettings, FlipSettings, NoiseSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.methods.mirrored import AscentSettings, Target, null_loss, step_seconds, unlearn_targets
from attrib_jax.parallel.hosts import fetch, host0_first, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, host_share, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import read_arrays, stored_arrays, write_arrays, write_json
from attrib_jax.storage.score_files import read_unlearned

_log = logging.getLogger(__name__)

_LOSSES_FILE = "group_losses.safetensors"
_NAMES_FILE = "groups.json"
# Draws of a query's loss that a device takes at once; fixed, so that losses do not depend on the devices.
_DRAWS_PER_TILE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupUnlearnConfig(MethodConfig, AscentSettings, NoiseSettings, FlipSettings, CaptionSettings):
    """Settings of unlearning groups."""

    method: str = setting("group-unlearn", "Attribution method.", choices=("group-unlearn",))
    group_draws: int = setting(
        200,
        "Draws of (timestep, noise) that the query's loss is averaged over, evenly over the schedule and the same for "
        "all groups.",
        low=1,
    )
    max_groups: int = setting(
        64,
        "Most groups that are unlearned; a data set with more is refused, with an estimate of the time.",
        low=1,
        performance=True,
    )


class UnlearnedGroups(NamedTuple):
    """Models without a group each.

    Attributes:
      names: (G,) names of the groups, sorted.
      member: (N,) which of them each image of the encoded data set belongs to.
      files: (G,) files of the selected weights, see `read_unlearned`.
    """

    names: tuple[str, ...]
    member: np.ndarray
    files: tuple[Path, ...]


def inputs(run: Run) -> dict[str, str]:
    """Fingerprint of which image belongs to which group, which that of the data set does not tell."""
    names = named_groups(run.dataset)
    return {} if names is None else {"groups": digest(f"{name}\0" for name in names)}


def check(run: Run, config: GroupUnlearnConfig) -> None:
    """Raises ValueError where the data set has no groups, one group alone, or more of them than `max_groups`."""
    names, dataset = named_groups(run.dataset), run.dataset
    if names is None:
        raise ValueError(
            f"method is 'group-unlearn', and the data set {dataset.name!r} has no groups: expected a column 'group' in "
            "its metadata file, or images in a folder for each group (docs/FORMATS.md). Name groups, or take another "
            "method."
        )
    _check_others(dataset.name, names)
    count = len(set(names))
    if count > config.max_groups:
        slots = data_mesh().size * config.queries_per_device
        steps = -(-count // slots) * config.max_steps
        seconds = step_seconds(run, config, _example(run))
        raise ValueError(
            f"max_groups is {config.max_groups}, and the data set {dataset.name!r} has {count:,} groups: a step of "
            f"{slots} of them takes {seconds:.2g} s here, so up to {config.max_steps} steps of each take up to "
            f"{_duration(seconds * steps)}. Raise max_groups, or lower max_steps, or join groups."
        )


def _check_others(dataset: str, names: Sequence[str]) -> None:
    if len(set(names)) == 1:
        raise ValueError(
            f"all {len(names)} images of the data set {dataset!r} are in one group, {names[0]!r}: expected images "
            "outside of each group, which are retained while it is unlearned. Name more groups."
        )


def _example(run: Run) -> tuple[np.ndarray, Any]:
    """Latents and conditioning like those of a training image, to measure time with."""
    pipeline = run.pipeline
    latents = np.zeros((*pipeline.latent_size, pipeline.vae.config.latent_channels), np.float32)
    return latents, jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float32), text_states(pipeline, [""]))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


def prepare(run: Run, config: GroupUnlearnConfig) -> UnlearnedGroups:
    """A model without each group: computed, resumed or reused.

    Groups none of whose images can be read are left out, with a warning.
    """
    check(run, config)
    everyone = named_groups(run.dataset)
    assert everyone is not None
    by_row = dict(zip(run.dataset.row_ids.tolist(), everyone))
    found = [by_row[row] for row in run.data.row_ids.tolist()]
    _check_others(run.dataset.name, found)
    if unread := sorted(set(everyone) - set(found)):
        _log.warning("no image can be read of %d groups, which have no score: %s", len(unread), ", ".join(unread[:5]))
    names, member = np.unique(np.asarray(found, dtype=object).astype(str), return_inverse=True)
    null = null_loss(run, config)
    stage = _stage(run, config)
    with run.timed("unlearn groups", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        targets = [
            Target(f"group {str(name)!r}", opened.path, f"group-{place:05d}", group=np.flatnonzero(member == place))
            for place, name in enumerate(names)
        ]
        unlearn_targets(run, targets, config, null)
        listed = [{"file": target.file.name, "group": str(name)} for target, name in zip(targets, names)]
        run_on_host0(lambda: write_json(opened.path / _NAMES_FILE, listed))
    return UnlearnedGroups(tuple(names.tolist()), member, tuple(target.file for target in targets))


def score(run: Run, queries: Sequence[QueryJob], config: GroupUnlearnConfig) -> list[Scored]:
    """Each image has an even share of its group's score, so that the scores of a group's images add up to it."""
    groups = prepare(run, config)
    with run.timed("losses of the queries"):
        losses = _query_losses(run, queries, groups, config)
    sizes, scored = np.bincount(groups.member), []
    for query, (before, after) in zip(queries, losses):
        arrays = {"before": before, "after": after}
        header = {"names": list(groups.names), "images": sizes.tolist()}
        run_on_host0(functools.partial(write_arrays, query.folder / _LOSSES_FILE, arrays, header))
        change = np.mean(after.astype(np.float64) - before, axis=1)
        scored.append(Scored(Scores(run.data.row_ids, (change / sizes)[groups.member])))
    return scored


def read_group_shares(folder: Path) -> list[Any] | None:
    """What unlearning each group did to the query of a folder, a `GroupShare` each; None where there are no losses."""
    # Reports alone need it.
    from attrib_jax.attribution.groups import counterfactual_shares

    file = folder / _LOSSES_FILE
    if stored_arrays(file) is None:
        return None
    arrays, header = read_arrays(file)
    return counterfactual_shares(header["names"], header["images"], arrays["before"], arrays["after"])


def _query_losses(
    run: Run, queries: Sequence[QueryJob], groups: UnlearnedGroups, config: GroupUnlearnConfig
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Losses of each query's draws under the model (S,) and without each group (G, S), float32; kept and resumed."""
    mesh, schedule = data_mesh(), run.pipeline.schedule
    draws, count = config.group_draws, 1 + len(groups.names)
    timesteps = noisy_timesteps(1.0, draws, schedule.num_train_timesteps)
    program = _compiled(run.predict, mesh)
    key = purpose_key(config.loss_seed, "group draws")
    size = _DRAWS_PER_TILE * mesh.size
    share = host_share(mesh, size)
    selected, rest = run.select(config.weights)
    fixed = replicate(mesh, (schedule, rest, key))
    placed = [replicate(mesh, (query.prepared.latents, query.prepared.text)) for query in queries]
    fields = {"loss": ((draws,), np.float32)}
    stores = [
        host0_first(functools.partial(ChunkStore, query.folder, fields, count, 1, name="group_losses"))
        for query in queries
    ]
    pending = [set(store.pending_chunks()) for store in stores]
    left = sum(map(len, pending))
    # Model by model, for all queries: 0 is the model itself.
    with progress(count * len(queries) * draws, "losses of the queries", "forward",
                  initial=(count * len(queries) - left) * draws) as bar:  # fmt: skip
        for model in range(count):
            lacking = [place for place, missing in enumerate(pending) if model in missing]
            if not lacking:
                continue
            weights = selected
            if model:
                stored: Any = run_on_host0(functools.partial(read_unlearned, groups.files[model - 1]))
                stored.pop("query_loss")
                weights = unflatten_names(stored)
            weights = replicate(mesh, weights)
            for place in lacking:
                losses = np.empty(draws, np.float32)
                for members, mask in zip(*padded_tiles(draws, size)):
                    mine = members[share]
                    batch = shard_batch(mesh, (timesteps[mine], mine))
                    losses[members[mask]] = fetch(program((fixed, weights, placed[place]), batch))[mask]
                if not np.isfinite(losses).all():
                    what = f"without group {groups.names[model - 1]!r}" if model else "under the model"
                    raise ValueError(
                        f"query {queries[place].name!r}: its loss {what} is NaN or infinite. Take a smaller "
                        f"unlearning_rate than {config.unlearning_rate}, or look for a damaged model."
                    )
                run_on_host0(functools.partial(stores[place].write, model, {"loss": losses[None]}))
                bar.update(draws)
    found = [store.read_all()["loss"] for store in stores]
    return [(each[0], each[1:]) for each in found]


@functools.lru_cache(maxsize=4)
def _compiled(predict: Predict, mesh: Mesh):
    return tile_map(mesh, functools.partial(_draw_losses, predict))


def _draw_losses(predict: Predict, shared: Any, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Losses (B,) of one example under draws number (B,) at timesteps (B,)."""
    (schedule, rest, key), selected, (latents, text) = shared
    timesteps, index = draws
    noise = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), latents.shape))(index)
    params = merge_weights(selected, rest)
    return denoising_losses(predict, params, schedule, latents, text, noise.astype(jnp.float32), timesteps)


def _stage(run: Run, config: GroupUnlearnConfig) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """Name, settings and inputs of the models without a group each."""
    names = [name for name in declared(AscentSettings) if not declared(AscentSettings)[name].setting.performance]
    settings = {name: getattr(config, name) for name in (*names, "loss_seed", "captions", "num_flips")}
    own = {**run.inputs, **inputs(run)}
    return f"groups/{config.weights}-{json_digest([settings, own['groups']])[:8]}", settings, own
