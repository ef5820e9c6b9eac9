"""The teacher: queries that the model draws, and the scores that a method gives every training image for them.

Both are stages that are computed, resumed or reused; the student (`attrib_jax.retrieval.student`) learns from them.
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Scores
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery, Query, SamplerSettings, generate, prepare_query, text_states
from attrib_jax.jobs.settings import PassSettings
from attrib_jax.methods import METHODS, check_method, method_inputs
from attrib_jax.methods.base import MethodConfig, QueryJob
from attrib_jax.parallel.hosts import host0_first, run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.training.tower import holdout_rows

# Images that the sampler draws in one call; fixed, so that a latent does not depend on how many are drawn.
_SAMPLES = 32
# Queries that a pass over the data set scores, where the method's config does not say.
_QUERIES_PER_PASS = 160
_JOINTS = ("{} and {}", "{} with {}", "{}, {}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherQueryConfig(SamplerSettings):
    """Which queries the teacher scores."""

    teacher_queries: int = setting(320, "Queries that the teacher scores, those held out included.", low=4)
    query_holdout: float = setting(
        0.2, "Share of the queries that the student is not trained on but measured on.", above=0, high=0.9
    )
    compositions: float = setting(
        0.25, "Share of the queries whose prompt joins the captions of two training images.", low=0, high=1
    )
    teacher_noises: int = setting(
        4,
        "Seeds of the training images' noise that the student's queries are shared out to, where the teacher takes "
        "losses; held-out queries have one that no other query has. 0: all queries have that of --loss_seed, and a "
        "student learns what it does to each image.",
        low=0,
    )
    query_seed: int = setting(0, "Seed of the choice of prompts; query i is drawn with seed i.", low=0, high=2**32 - 1)

    def noise_seeds(self, first: int) -> np.ndarray:
        """The seed of the training images' noise for each query (Q,), counted from `first`, the held-out queries'."""
        if not self.teacher_noises:
            return np.full(self.teacher_queries, first)
        train = self.teacher_queries - self.num_held_out
        shared_out = 1 + np.arange(train) * self.teacher_noises // train
        return (first + np.append(shared_out, np.zeros(self.num_held_out, np.int64))) % 2**32

    @property
    def num_held_out(self) -> int:
        """Queries that are held out: at least one, and not all."""
        return min(max(1, round(self.query_holdout * self.teacher_queries)), self.teacher_queries - 1)


class TeacherQueries(NamedTuple):
    """Queries that the model drew.

    Attributes:
      prompts: of each query.
      latents: (Q, h, w, c) float32, scaled.
      held_out: (Q,) bool, those that the student is measured on.
    """

    prompts: list[str]
    latents: Any
    held_out: np.ndarray


def draw_prompts(dataset: Dataset, config: TeacherQueryConfig) -> tuple[list[str], np.ndarray]:
    """Prompts (Q) and which are held out (Q,): captions of training images, and pairs of captions.

    Held-out prompts come from near-duplicate groups of images that no other prompt comes from.

    Raises ValueError where the data set has fewer than two images with a caption on either side.
    """
    rng = np.random.default_rng([config.query_seed, 0x7EAC])
    seed = int(rng.integers(2**31))
    apart = holdout_rows(dataset, config.num_held_out / config.teacher_queries, seed)
    sides = {True: apart, False: np.setdiff1d(np.arange(len(dataset)), apart)}
    held_out = np.arange(config.teacher_queries) >= config.teacher_queries - config.num_held_out
    prompts: list[str] = []
    for side in (False, True):
        captions = list(dict.fromkeys(dataset.captions(row)[0] for row in sides[side].tolist()))
        captions = [text for text in captions if text.strip()]
        if len(captions) < 2:
            raise ValueError(
                f"teacher_queries is {config.teacher_queries} and query_holdout {config.query_holdout:g}, which leaves "
                f"{len(captions)} different captions for the {'held-out' if side else 'other'} queries: expected two "
                "or more. Take a data set with more captions, or another query_holdout."
            )
        count = int(np.sum(held_out == side))
        # Every caption comes once before any comes twice.
        order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])[:count]
        joined = rng.permutation(count) < round(config.compositions * count)
        for first, join in zip(order.tolist(), joined.tolist()):
            prompt = captions[first]
            if join:
                second = captions[(first + 1 + int(rng.integers(len(captions) - 1))) % len(captions)]
                prompt = _JOINTS[int(rng.integers(len(_JOINTS)))].format(prompt, second)
            prompts.append(prompt)
    return prompts, held_out


def teacher_queries(run: Run, config: TeacherQueryConfig) -> TeacherQueries:
    """The queries, drawn by the model, resumed or reused."""
    prompts, held_out = run_on_host0(lambda: draw_prompts(run.dataset, config))
    height, width, channels = run.data.latent_shape
    with (
        run.timed("teacher queries", run.root.is_finished(*_query_stage(run, config))),
        run.root.stage(*_query_stage(run, config)) as stage,
    ):
        fields = {"latents": ((height, width, channels), np.float32)}
        store = host0_first(lambda: ChunkStore(stage.path, fields, len(prompts), _SAMPLES, name="latents"))
        pending = store.pending_chunks()
        with progress(len(prompts), "draw queries", "query", initial=len(prompts) - _rows(store, pending)) as bar:
            for index in pending:
                rows = store.rows(index)
                # A last group that is not full is filled up: one program for all.
                members = (list(range(rows.start, rows.stop)) * _SAMPLES)[:_SAMPLES]
                found = generate(run.pipeline, run.predict, [prompts[row] for row in members], members, config)[
                    : rows.stop - rows.start
                ]
                run_on_host0(functools.partial(store.write, index, {"latents": np.asarray(found, np.float32)}))
                bar.update(rows.stop - rows.start)
        return TeacherQueries(prompts, store.array("latents"), held_out)


def prepare_teacher_queries(run: Run, queries: TeacherQueries, rows: Any) -> list[PreparedQuery]:
    """The queries at positions `rows` as image and model inputs."""
    prepared = []
    for row in rows:
        prompt = queries.prompts[row]
        # Given text states say nothing of what a tokenizer makes of each prompt.
        text = jax.tree.map(lambda leaf: np.asarray(leaf)[0], text_states(run.pipeline, [prompt]))
        query = Query(prompt=prompt, latents=np.asarray(queries.latents[row : row + 1])[0], text=text)
        prepared.append(prepare_query(run.pipeline, run.predict, query))
    return prepared


def teacher_scores(run: Run, queries: TeacherQueries, config: TeacherQueryConfig, method: MethodConfig) -> Any:
    """Scores of every encoded training image for each query -> (Q, N) float32, on disk; resumed or reused.

    Queries under the same noise share a pass over the data set, as many as `method.queries_per_pass` says, 160 if it
    does not.

    Raises ValueError where the method scores a part of the images, or does not fit the model.
    """
    check_method(run, method)
    if method.partial:
        raise ValueError(
            f"cascade is {getattr(method, 'cascade', 0):g}: a teacher has to score all training images, and a cascade "
            "scores a part. Leave out cascade."
        )
    settings = {"queries": config.describe(), "method": method.describe()}
    name = f"teacher/{method.method}-{json_digest(settings)[:8]}"
    stage_of = (name, settings, method_inputs(run, method))
    count, size = len(queries.prompts), len(run.data)
    seeds = config.noise_seeds(method.image_seed) if isinstance(method, PassSettings) else np.zeros(count, np.int64)
    with run.timed("teacher scores", run.root.is_finished(*stage_of)), run.root.stage(*stage_of) as stage:
        per_pass = getattr(method, "queries_per_pass", 0) or _QUERIES_PER_PASS
        fields = {"score": ((size,), np.float32)}
        store = host0_first(lambda: ChunkStore(stage.path, fields, count, min(per_pass, count), name="scores"))
        pending = store.pending_chunks()
        with progress(count, "teacher", "query", initial=count - _rows(store, pending)) as bar:
            for index in pending:
                rows = store.rows(index)
                folder = stage.path / "pass"
                found = []
                for seed in dict.fromkeys(seeds[rows].tolist()):
                    # Queries of one noise are neighbours.
                    members = np.arange(rows.start, rows.stop)[seeds[rows] == seed].tolist()
                    own = _under_noise(method, seed)
                    jobs = _jobs(run, queries, members, folder)
                    found += [scores_by_row(run, each.scores) for each in METHODS[own.method].score(run, jobs, own)]
                run_on_host0(functools.partial(store.write, index, {"score": np.stack(found).astype(np.float32)}))
                # What the method kept for a resumed pass.
                run_on_host0(functools.partial(shutil.rmtree, folder, ignore_errors=True))
                bar.update(rows.stop - rows.start)
        return store.array("score")


def _under_noise(method: MethodConfig, seed: int) -> MethodConfig:
    """The method with training images scored under the noise of `seed`, where it takes losses."""
    if not isinstance(method, PassSettings):
        return method
    return dataclasses.replace(method, noise_seed=seed)  # type: ignore[call-arg]  # an intersection of two classes


def _jobs(run: Run, queries: TeacherQueries, rows: Sequence[int], folder: Path) -> list[QueryJob]:
    prepared = prepare_teacher_queries(run, queries, rows)
    jobs = [QueryJob(f"query-{row:06d}", {}, each, folder / f"query-{row:06d}") for row, each in zip(rows, prepared)]
    for job in jobs:
        run_on_host0(functools.partial(job.folder.mkdir, parents=True, exist_ok=True))
    return jobs


def scores_by_row(run: Run, scores: Scores) -> np.ndarray:
    """Scores (N,) in the order of the encoded data set; images without one get the lowest."""
    found = np.full(len(run.data), np.min(scores.score))
    order = np.argsort(run.data.row_ids)
    found[order[np.searchsorted(run.data.row_ids[order], scores.row_id)]] = scores.score
    return found


def _query_stage(run: Run, config: TeacherQueryConfig) -> tuple[str, dict[str, Any], dict[str, str]]:
    settings = config.describe()
    # The pictures do not depend on how they are scored.
    del settings["teacher_noises"]
    return f"teacher_queries/{json_digest(settings)[:8]}", settings, run.inputs


def _rows(store: ChunkStore, chunks: list[int]) -> int:
    return sum(store.rows(index).stop - store.rows(index).start for index in chunks)
