"""LoRA: low-rank factors beside the layers of a model are trained on a data set, everything else keeps its bits.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021: y = x K + (alpha / r) (x A) B with A drawn at
random and B = 0 at first. The loss is the model's own, on one (image, flip, caption, timestep, noise) draw for each
place of a batch. A training may go without some of the images, and otherwise sees the same draws
(`training/draws.py`): `launch.verify` compares such adapters.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attrib_jax.convert.adapters.lora import save_lora
from attrib_jax.convert.adapters.lora_files import denoiser_part
from attrib_jax.convert.pipeline import Pipeline, require_one_text_encoder, tokenize, unconditional
from attrib_jax.convert.weights.names import torch_name
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.weights import flatten_names, merge_weights, unflatten_names
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.diffusion.training import TrainState, denoising_batch_loss, init_state, train_step
from attrib_jax.jobs.context import Run
from attrib_jax.models.low_rank import DOWN, UP, LowRank
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch
from attrib_jax.storage.stages import open_stage
from attrib_jax.training.draws import Training, check_removed, draw_batches
from attrib_jax.training.loop import FitConfig, run_steps, usable_devices

# The attention of a CLIP text encoder, which is what diffusers trains of it.
_TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
_STEPS_PER_DRAW = 100  # whose batches are drawn together


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """Settings of a LoRA's training; `log_every` is the number of steps between two lines of metrics.jsonl."""

    rank: int = setting(8, "Rank of the factors.", low=1, symbol="r", flag="lora_rank")
    alpha: float | None = setting(
        None,
        "The product of the factors is multiplied by alpha / rank; the rank if not given.",
        flag="lora_alpha",
        above=0,
    )
    target_modules: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "How the PyTorch names end of the denoiser's linear layers and convolutions that get factors.",
    )
    train_text_encoder: bool = setting(
        False,
        "Whether the attention of the text encoder gets factors too, for a model with one. Attribution does not move "
        "these.",
    )
    steps: int = setting(1000, "Optimiser steps.", low=1, flag="train_steps")
    batch_size: int = setting(8, "Images a step, over all devices.", low=1, flag="train_batch_size")
    learning_rate: float = setting(1e-4, "Constant learning rate of AdamW; small models need more.", above=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW.", low=0)
    caption_dropout: float = setting(
        0.0, "Share of captions replaced by the empty one, for classifier-free guidance.", low=0, high=1
    )
    random_flips: bool = setting(False, "Mirror half of the images that are drawn.")
    seed: int = setting(0, "Seed of factors, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")
    checkpoint_every: int = setting(250, "Steps between checkpoints.", low=1, performance=True)

    log_every: int = 10

    @property
    def strength(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class _Frozen(NamedTuple):
    """What a step reads and never changes; arguments of the compiled step, not constants in it."""

    learning_rate: Any
    weight_decay: Any
    strength: Any
    unet: Any
    text_encoder: Any
    schedule: NoiseSchedule


def train_lora(workdir: str | os.PathLike, run: Run, config: LoraConfig) -> Path:
    """Trains a LoRA on the run's data set -> `<workdir>/lora`, a folder that diffusers' `load_lora_weights` reads.

    A run resumes from its newest checkpoint, to the bit. Hold the lock of `workdir`.

    Args:
      workdir: keeps checkpoints and `metrics.jsonl` in its stage `lora_training`.
      run: the base model and the data set, encoded where it has to be.
      config: see `LoraConfig`.

    Raises:
      ValueError: a target module is in no layer's name; the text encoder is to be trained of a model with several; or
        the loss is not finite.
      StageMismatchError: `workdir` holds a run with other settings, model or images.
    """
    initial_factors(run.pipeline, config, config.seed)  # before anything is encoded
    stage = open_stage(workdir, "lora_training", config.describe(), run.inputs)
    factors = train_factors(stage.path, run, config, Training(np.zeros(0, np.int64), config.seed))
    folder = Path(workdir) / "lora"
    save_lora(factors, folder, denoiser_part(run.pipeline))
    if not stage.finished:
        stage.finish()
    return folder


def initial_factors(pipeline: Pipeline, config: LoraConfig, seed: int) -> dict[str, Any]:
    """Factors before training, by part: A from a normal distribution of deviation 1 / r, as diffusers draws it, B = 0.

    Raises ValueError naming a target module that no linear layer or convolution of the denoiser has.
    """
    targets = {"unet": config.target_modules}
    if config.train_text_encoder:
        require_one_text_encoder(pipeline, "training a LoRA of the text encoder", "leave train_text_encoder out")
        targets["text_encoder"] = _TEXT_MODULES
    key, factors = purpose_key(seed, "lora weights"), {}
    for part, modules in targets.items():
        kernels = {
            path: leaf for path, leaf in flatten_names(pipeline.params[part]).items() if path.endswith("/kernel")
        }
        names = {path: torch_name(path).removesuffix(".weight") for path in kernels}
        for module in modules:
            if not any(f".{name}".endswith(f".{module}") for name in names.values()):
                raise ValueError(
                    f"target_modules has {module!r}, with which no layer name of this {part} ends; expected ends of "
                    f"names such as {min(names.values(), key=lambda name: 'attn' not in name)!r}"
                )
        chosen = [path for path, name in names.items() if f".{name}".endswith(tuple(f".{x}" for x in modules))]
        flat = {}
        for number, path in enumerate(chosen):
            *kernel, rows, columns = kernels[path].shape
            layer, own = path.removesuffix("/kernel"), jax.random.fold_in(jax.random.fold_in(key, len(factors)), number)
            flat[f"{layer}/{DOWN}/kernel"] = jax.random.normal(own, (*kernel, rows, config.rank)) / config.rank
            flat[f"{layer}/{UP}/kernel"] = jnp.zeros((*[1] * len(kernel), config.rank, columns))
        factors[part] = unflatten_names(flat)
    return factors


def train_factors(
    path: str | os.PathLike, run: Run, config: LoraConfig, training: Training, description: str = "train LoRA"
) -> dict[str, Any]:
    """All steps, from the newest checkpoint in `path` -> factors by part, with alpha / rank in the second of a pair.

    Args:
      path: folder of checkpoints and `metrics.jsonl`.
      run: model and data set.
      config: see `LoraConfig`; its seed is not read.
      training: images that it goes without, and its seed.
      description: text of the progress bar.
    """
    state, step, batches = _program(run, config, training)
    fit = FitConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
    )
    trained = run_steps(path, step, state, batches, fit, description).params
    return jax.tree.map(np.asarray, {part: _scaled(tree, config.strength) for part, tree in trained.items()})


def seconds_per_step(run: Run, config: LoraConfig, steps: int = 5) -> float:
    """Measured seconds of an optimiser step, without compiling."""
    state, step, batches = _program(run, dataclasses.replace(config, steps=steps + 1), Training(np.zeros(0, np.int64)))
    reader = batches(0)
    state, metrics = step(state, next(reader))
    jax.block_until_ready(metrics)
    began = time.monotonic()
    for batch in reader:
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return (time.monotonic() - began) / steps


def with_factors(pipeline: Pipeline, factors: dict[str, Any]) -> Pipeline:
    """The base with factors by part kept apart in it, as `attach_lora` has those of a UNet; a text encoder's too."""
    parts: dict[str, Any] = {part: LowRank(getattr(pipeline, part)) for part in factors}
    params = {part: merge_weights(tree, pipeline.params[part]) for part, tree in factors.items()}
    return dataclasses.replace(pipeline, **parts, params=pipeline.params | params)


def _program(run: Run, config: LoraConfig, training: Training) -> tuple[TrainState, Any, Any]:
    """The state before the first step, `(state, batch) -> (state, metrics)`, and `start -> iterator of batches`."""
    pipeline, data = run.pipeline, run.data
    check_removed(training.removed, len(data))
    mesh = data_mesh(jax.local_devices()[: usable_devices(config.batch_size, jax.local_device_count())])
    factors = initial_factors(pipeline, config, training.seed)
    with_text = "text_encoder" in factors
    frozen = _Frozen(
        config.learning_rate,
        config.weight_decay,
        config.strength,
        pipeline.params["unet"],
        pipeline.params["text_encoder"] if with_text else {},
        pipeline.schedule,
    )
    state = init_state(factors, _optimizer(config.learning_rate, config.weight_decay))
    state = replicate(mesh, jax.tree.map(np.array, state))
    frozen, key = replicate(mesh, (frozen, purpose_key(training.seed, "train lora")))
    if with_text:
        leaves, empty = {"text": _token_ids(run)}, {"text": tokenize(pipeline, [""])[0]}
    else:
        leaves = {"text": data.text, **data.by_caption}
        given = jax.tree.map(np.asarray, unconditional(pipeline))
        empty = given if isinstance(given, dict) else {"text": given}

    def conditioning(row: np.ndarray, caption: np.ndarray) -> Any:
        """What captions (B,), of which -1 is the empty one, and images (B,) tell the model; leaves (B, ...)."""
        found = {name: np.asarray(array[np.maximum(caption, 0)]) for name, array in leaves.items()}
        for name, leaf in found.items():
            is_empty = (caption < 0).reshape(-1, *[1] * (leaf.ndim - 1))
            found[name] = np.where(is_empty, empty[name], leaf).astype(empty[name].dtype)
        found |= {name: np.asarray(array[row], np.float32) for name, array in data.by_image.items()}
        return found if found.keys() != {"text"} else found["text"]

    def batches(start: int) -> Iterator[Any]:
        for first in range(start, config.steps, _STEPS_PER_DRAW):
            draws = draw_batches(data, training, config, first, min(first + _STEPS_PER_DRAW, config.steps))
            for row, flip, caption in zip(*draws, strict=True):
                latents = np.asarray(data.latents[row, flip], np.float32)
                yield shard_batch(mesh, (latents, conditioning(row, caption)))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return _step(LowRank(pipeline.unet), LowRank(pipeline.text_encoder), state, frozen, batch, key)

    return state, step, batches


def _token_ids(run: Run) -> np.ndarray:
    """The token ids of all captions, in the order of the encoded text states."""
    if run.dataset.name.startswith("latents:"):
        raise ValueError(
            f"train_text_encoder is True, but {run.dataset.name!r} holds the text states that a text encoder made; "
            "give the data set with its captions, or leave train_text_encoder out"
        )
    stored = len(run.data.first_caption) - 1
    return tokenize(run.pipeline, [text for row in range(stored) for text in run.dataset.captions(row)])


def _optimizer(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """AdamW at a constant rate; the gradient's norm is clipped to 1, as in diffusers' LoRA training."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(unet: LowRank, text_encoder: LowRank, state: TrainState, frozen: _Frozen, batch: Any, key: jax.Array):
    """One optimiser step -> new state and metrics; every draw is a function of the key and the step's number."""

    def loss_fn(factors, batch, key):
        latents, text = batch
        if "text_encoder" in factors:
            weights = merge_weights(_scaled(factors["text_encoder"], frozen.strength), frozen.text_encoder)
            text = text_encoder.apply({"params": weights}, text)
        weights = merge_weights(_scaled(factors["unet"], frozen.strength), frozen.unet)
        keys = jax.random.split(key, 3)
        return denoising_batch_loss(predictor(unet), frozen.schedule, weights, latents, text, *keys), {}

    return train_step(loss_fn, _optimizer(frozen.learning_rate, frozen.weight_decay), 0.0, state, batch, key)


def _scaled(factors: Any, strength: Any) -> Any:
    """Factors whose products are multiplied by `strength`: as `LowRank` takes them."""
    flat = flatten_names(factors)
    return unflatten_names({name: leaf * strength if f"/{UP}/" in name else leaf for name, leaf in flat.items()})
