"""The student: maps features of a query and of training images to vectors whose cosine orders images as a teacher does.

After FastGDA (NeurIPS 2025; docs/METHOD.md section 15), with two sides that start as the tower's own similarity.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.evaluation.metrics import average_precision, ranks
from attrib_jax.parallel.hosts import is_host0
from attrib_jax.parallel.mesh import padded_tiles
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import make_folder, read_arrays, write_arrays, write_bytes
from attrib_jax.storage.state import StateStore

LOSSES = ("softmax", "rank", "top")
_FILE = "student.safetensors"
# Vectors in a compiled call. Fixed, so that one does not depend on how many are asked for.
_QUERY_TILE, _IMAGE_TILE = 16, 1024
# Training images that a step compares its queries with; all of a smaller data set.
_CANDIDATES = 8192
_EPOCHS_BETWEEN_STATES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(Settings):
    """Architecture and training of a student."""

    student_dim: int = setting(128, "Dimension of the vectors of the index.", low=1)
    student_width: int = setting(256, "Width of the student's hidden layers.", low=1)
    student_layers: int = setting(2, "Hidden layers of the student; 0 is a linear mapping.", low=0)
    student_dropout: float = setting(0.1, "Dropout of the student's hidden layers.", low=0, high=0.9)
    student_loss: str = setting(
        "softmax",
        "Loss of the student: cross-entropy of all images together against the teacher's top L (softmax), binary "
        "cross-entropy of each image against its normalised rank (rank), or against being in the top L (top).",
        choices=LOSSES,
    )
    student_top: int = setting(
        100, "L, the number of best images by the teacher that the loss and mAP(L) are about.", low=1, symbol="L"
    )
    student_epochs: int = setting(60, "Passes over the teacher's queries.", low=1)
    student_batch: int = setting(16, "Queries in a training step.", low=1)
    student_learning_rate: float = setting(1e-3, "Peak learning rate of AdamW, with a cosine decay to 0.", above=0)
    student_weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW.", low=0)
    student_seed: int = setting(0, "Seed of the student's weights and batches.", low=0, high=2**32 - 1)


class Side(nn.Module):
    """One side of the student: features (..., F) -> vectors (..., dim) at unit length.

    The sum of a linear mapping, which starts as an orthogonal one that both sides share, and an MLP that starts at 0,
    so that an untrained student's cosine is about that of the features.
    """

    dim: int
    width: int
    layers: int
    dropout: float

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        hidden = features
        for _ in range(self.layers):
            hidden = nn.relu(nn.Dense(self.width)(hidden))
            hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        mapped = nn.Dense(self.dim, use_bias=False, name="linear", kernel_init=_orthogonal)(features)
        if self.layers:
            mapped += nn.Dense(self.dim, name="residual", kernel_init=nn.initializers.zeros)(hidden)
        return mapped / jnp.maximum(jnp.linalg.norm(mapped, axis=-1, keepdims=True), 1e-6)


def _orthogonal(_key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The same for both sides: rows or columns at unit length, at right angles."""
    return nn.initializers.orthogonal(column_axis=-1)(jax.random.key(0), shape, dtype)


class Student(nn.Module):
    """Both sides, and the scale and bias that turn a cosine into a logit."""

    config: StudentConfig

    def setup(self):
        config = self.config
        sizes = (config.student_dim, config.student_width, config.student_layers, config.student_dropout)
        self.query, self.image = Side(*sizes), Side(*sizes)
        self.log_scale = self.param("log_scale", lambda _: jnp.log(jnp.asarray(10.0)))
        self.bias = self.param("bias", lambda _: jnp.zeros(()))

    def __call__(self, queries: jax.Array, images: jax.Array, train: bool = False) -> jax.Array:
        """Features (B, F) and (C, F) -> logits (B, C)."""
        cosine = self.query(queries, train) @ self.image(images, train).T
        return jnp.exp(self.log_scale) * cosine + self.bias

    def embed_queries(self, features: jax.Array) -> jax.Array:
        """(B, F) -> (B, dim)."""
        return self.query(features)

    def embed_images(self, features: jax.Array) -> jax.Array:
        """(C, F) -> (C, dim)."""
        return self.image(features)


class Lesson(NamedTuple):
    """What a student learns from.

    Attributes:
      queries: (Q, F) features of the teacher's queries.
      images: (N, F) features of the training images.
      scores: (Q, N) of the teacher, larger is more influential.
      held_out: (Q,) bool, the queries that the student is not trained on.
    """

    queries: np.ndarray
    images: np.ndarray
    scores: np.ndarray
    held_out: np.ndarray


def student_loss(
    logits: jax.Array, rank: jax.Array, mask: jax.Array, kind: str, top: int, num_images: int
) -> jax.Array:
    """The loss of B queries' logits (B, C) against the teacher's ranks (B, C), 0 for the best of `num_images` -> ().

    `mask` (C,) is 1 for a candidate, 0 for padding. Targets are 1 - rank / N for `rank`, 1 up to `top` for `top`, and
    for `softmax` a distribution that falls linearly over the first `top` images.
    """
    if kind == "softmax":
        target = jnp.maximum(0.0, 1.0 - rank / top) * mask
        target /= jnp.maximum(target.sum(axis=1, keepdims=True), 1e-6)
        log_shares = jax.nn.log_softmax(jnp.where(mask > 0, logits, -1e9), axis=1)
        return -jnp.mean(jnp.sum(target * log_shares, axis=1))
    target = 1.0 - rank / num_images if kind == "rank" else (rank < top).astype(jnp.float32)
    losses = optax.sigmoid_binary_cross_entropy(logits, target)
    return jnp.sum(losses * mask) / (jnp.sum(mask) * len(logits))


def mean_average_precision(found: np.ndarray, teacher: np.ndarray, top: int) -> np.ndarray:
    """mAP(L) of each query, (Q,): average precision of an order of images against the teacher's first `top`.

    Args:
      found: (Q, N) scores whose order is judged.
      teacher: (Q, N) scores of the teacher.
      top: L.
    """
    best = np.argsort(-np.asarray(teacher), axis=1, kind="stable")[:, :top]
    order = ranks(np.asarray(found))
    return np.array([average_precision(row[own]) for row, own in zip(order, best)])


def init_student(config: StudentConfig, width: int) -> Any:
    """Parameters before training, for features of this width."""
    features = jnp.zeros((1, width))
    return Student(config).init(purpose_key(config.student_seed, "student weights"), features, features)["params"]


def train_student(path: Path, lesson: Lesson, config: StudentConfig) -> tuple[Any, list[dict[str, float]]]:
    """Trains a student, or goes on from the state in `path` -> parameters and the log, a line an epoch.

    The log, in `metrics.jsonl` too, has the training loss and mAP(L) of the held-out queries. Every epoch is a function
    of the seed and its number, so a training that was stopped ends with the same bits.

    Raises ValueError where the loss is not finite.
    """
    train = np.flatnonzero(~lesson.held_out)
    batch = min(config.student_batch, len(train))
    steps = len(train) // batch
    rank = ranks(np.asarray(lesson.scores)[train]) - 1
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(config.student_learning_rate, config.student_epochs * steps),
        weight_decay=config.student_weight_decay,
    )
    params = init_student(config, lesson.images.shape[1])
    state = (params, optimizer.init(params))
    store, start, log = StateStore(path, "training"), 0, []
    stored = store.read(jax.tree.map(np.asarray, state))
    if stored is not None:
        state, (start, log) = stored
    step = _step_program(config, optimizer, jnp.asarray(lesson.queries), jnp.asarray(lesson.images))
    key = purpose_key(config.student_seed, "student dropout")
    with progress(config.student_epochs, "train the student", "epoch", initial=start) as bar:
        for epoch in range(start, config.student_epochs):
            rng = np.random.default_rng([config.student_seed, epoch])
            order, losses = rng.permutation(len(train))[: steps * batch].reshape(steps, batch), []
            for number, members in enumerate(order):
                ids, mask = _candidates(rng, rank[members], config.student_top)
                step_key = jax.random.fold_in(key, epoch * steps + number)
                state, loss = step(state, train[members], ids, mask, rank[members][:, ids], step_key)
                losses.append(loss)
            line = {"epoch": epoch + 1, "loss": float(np.mean([float(loss) for loss in losses]))}
            if lesson.held_out.any():
                line[f"held_out_map_{config.student_top}"] = float(held_out(state[0], config, lesson).mean())
            if not np.isfinite(line["loss"]):
                raise ValueError(
                    f"the student's loss is {line['loss']} at epoch {epoch + 1} with student_learning_rate="
                    f"{config.student_learning_rate:g}; take a lower one"
                )
            log.append(line)
            if (epoch + 1) % _EPOCHS_BETWEEN_STATES == 0 and is_host0():
                store.write(jax.tree.map(np.asarray, state), [epoch + 1, log])
            bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in line.items()), refresh=False)
            bar.update()
    params = jax.tree.map(np.asarray, state[0])
    if is_host0():
        write_bytes(make_folder(path) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
        save_student(path / _FILE, params, config, lesson.images.shape[1])
        store.remove()
    return params, log


def _step_program(
    config: StudentConfig, optimizer: optax.GradientTransformation, queries: jax.Array, images: jax.Array
) -> Any:
    """The compiled `(state, members, ids, mask, rank, key) -> (state, loss)` of one step."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, members, ids, mask, rank, key):
        params, moments = state

        def loss_of(params):
            logits = Student(config).apply(
                {"params": params}, queries[members], images[ids], train=True, rngs={"dropout": key}
            )
            return student_loss(logits, rank, mask, config.student_loss, config.student_top, len(images))

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return step


def held_out(params: Any, config: StudentConfig, lesson: Lesson) -> np.ndarray:
    """mAP(L) of the student against the teacher, of each held-out query (H,)."""
    vectors = embed_queries(params, config, lesson.queries[lesson.held_out])
    found = vectors @ embed_images(params, config, lesson.images).T
    return mean_average_precision(found, np.asarray(lesson.scores)[lesson.held_out], config.student_top)


def _candidates(rng: np.random.Generator, rank: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (C,) of a step and their mask: all, or each query's first ones and random others, C being fixed."""
    size = rank.shape[1]
    if size <= _CANDIDATES:
        return np.arange(size), np.ones(size, np.float32)
    best = np.unique(np.argpartition(rank, top - 1, axis=1)[:, :top])
    # Where the first ones of all queries are too many, some of them.
    best = rng.permutation(best)[: _CANDIDATES // 2]
    others = np.setdiff1d(rng.choice(size, _CANDIDATES - len(best), replace=False), best)
    ids = np.concatenate([best, others, np.zeros(_CANDIDATES - len(best) - len(others), np.int64)])
    mask = (np.arange(_CANDIDATES) < len(best) + len(others)).astype(np.float32)
    return ids, mask


def embed_queries(params: Any, config: StudentConfig, features: np.ndarray) -> np.ndarray:
    """Vectors of queries at unit length, (Q, F) -> (Q, dim) float32."""
    return _embed(params, config, "embed_queries", features, _QUERY_TILE)


def embed_images(params: Any, config: StudentConfig, features: np.ndarray) -> np.ndarray:
    """Vectors of training images at unit length, (N, F) -> (N, dim) float32."""
    return _embed(params, config, "embed_images", features, _IMAGE_TILE)


def _embed(params: Any, config: StudentConfig, method: str, features: np.ndarray, tile: int) -> np.ndarray:
    vectors = np.empty((len(features), config.student_dim), np.float32)
    tiles, _ = padded_tiles(len(features), tile)
    for members in tiles:
        vectors[members] = np.asarray(_apply(config, method, params, features[members]))
    return vectors


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: StudentConfig, method: str, params: Any, features: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return jnp.asarray(Student(config).apply({"params": params}, features, method=method))


def save_student(file: Path, params: Any, config: StudentConfig, width: int) -> None:
    """Writes parameters with the config and the width of the features."""
    arrays = {name: np.asarray(value) for name, value in flatten_names(params).items()}
    write_arrays(file, arrays, {"config": config.describe(), "width": width})


def load_student(file: Path) -> tuple[Any, StudentConfig, int]:
    """Parameters, config and the width of the features.

    Raises DamagedFileError for a truncated or damaged file, FileNotFoundError where there is none.
    """
    arrays, header = read_arrays(file)
    return unflatten_names(arrays), StudentConfig(**header["config"]), int(header["width"])


def stored_student(path: Path) -> Path:
    """Where a stage keeps its student."""
    return path / _FILE
