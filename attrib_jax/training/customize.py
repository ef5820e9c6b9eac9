"""Custom Diffusion: a pipeline learns a new word from one or a few images, to be attributed to them later.

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023: the key and value projections of the
cross-attention layers and the embedding of one new token are trained, everything else keeps its bits. These are the
models of the Customized-Model benchmark (METHOD.md section 6).
"""

import dataclasses
import functools
import itertools
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from attrib_jax.convert.adapters.custom_diffusion import save_custom_diffusion
from attrib_jax.convert.adapters.textual_inversion import add_tokens
from attrib_jax.convert.pipeline import Pipeline, encode_text, require_one_text_encoder, tokenize
from attrib_jax.convert.tokenizer import tokenize_captions
from attrib_jax.core.checks import check_finite
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.weights import count_weights, merge_weights, select_weights
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.diffusion.training import DiffusionBatch, TrainState, diffusion_loss, init_state, train_step
from attrib_jax.jobs.context import model_fingerprint
from attrib_jax.jobs.encode import encode_images, image_size, read_skipped
from attrib_jax.models.clip import CLIPTextModel
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh, replicate
from attrib_jax.storage.stages import open_stage
from attrib_jax.training.draws import Training, check_removed
from attrib_jax.training.loop import FitConfig, run_steps, usable_devices

_log = logging.getLogger(__name__)

_WEIGHTS = "cross-attn-kv"
# Where a text encoder keeps its table of token embeddings, (vocabulary, d).
_EMBEDDING = ("text_model", "embeddings", "token_embedding", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomizeConfig(Settings):
    """Settings of a fine-tune; `log_every` is the number of steps between two lines of metrics.jsonl."""

    initializer_token: str = setting(
        dataclasses.MISSING, "A word that the tokenizer knows whole; the new token starts with its embedding."
    )
    token: str = setting("<new1>", "The new token as prompts hold it, a name in <>.")
    caption: str | None = setting(
        None,
        "Caption of every exemplar, with the token in it; their own captions if not given.",
        flag="exemplar_caption",
    )
    steps: int = setting(300, "Optimiser steps.", low=1, flag="train_steps")
    batch_size: int = setting(
        8, "Images a step, over all devices; as many prior images beside them.", low=1, flag="train_batch_size"
    )
    learning_rate: float = setting(
        1e-5, "Constant learning rate of AdamW; 1e-5 suits Stable Diffusion, small models need more.", above=0
    )
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW.", low=0)
    prior_weight: float = setting(1.0, "Weight of the loss on prior images beside the exemplars' 1.", low=0)
    random_flips: bool = setting(False, "Mirror half of the images that are drawn.")
    seed: int = setting(0, "Seed of weights, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")
    checkpoint_every: int = setting(250, "Steps between checkpoints.", low=1, performance=True)

    log_every: int = 10

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"<[^\s/\0]+>", self.token):
            raise ValueError(f"token is {self.token!r}: expected a name in <> without spaces or '/', such as '<new1>'")
        if self.caption is not None and self.token not in self.caption:
            raise ValueError(
                f"exemplar_caption is {self.caption!r}: expected a text that holds the token {self.token!r}. Add it."
            )


class _Frozen(NamedTuple):
    """What a step reads and never changes; arguments of the compiled step, not constants in it."""

    learning_rate: float
    weight_decay: float
    prior_weight: float

    rest: Any
    text_params: Any
    token_id: Any
    schedule: NoiseSchedule
    empty_ids: jax.Array
    exemplars: DiffusionBatch
    prior: DiffusionBatch | None
    # (N,) whether an exemplar is left out; (N,) positions of the others, first; how many these are.
    is_removed: Any
    kept: Any
    num_kept: Any


def customize(
    workdir: str | os.PathLike,
    pipeline: Pipeline,
    exemplars: Dataset,
    config: CustomizeConfig,
    prior: Dataset | None = None,
) -> Path:
    """Fine-tunes `pipeline` on `exemplars` -> `<workdir>/custom`, a folder that `apply_custom_diffusion` reads.

    The folder holds `pytorch_custom_diffusion_weights.pt` (the trained UNet weights) and `<token>.bin` (its embedding).
    A run resumes from its newest checkpoint, to the bit. Hold the lock of `workdir`.

    Args:
      workdir: keeps latents, checkpoints and `metrics.jsonl` in its stage `customize`.
      pipeline: the base; it is not changed.
      exemplars: images of the new concept at the model's resolution.
      config: see `CustomizeConfig`.
      prior: real images with captions of the concept's kind, to keep the model from forgetting it; None for none.

    Raises:
      ValueError: the token exists, `initializer_token` is no single token, a caption lacks the token or is cut before
        it, images have another size than the model's, or the loss is not finite.
      StageMismatchError: `workdir` holds a run with other settings, model or images.
    """
    customization = Customization(pipeline, exemplars, config, prior)
    stage = open_stage(workdir, "customize", config.describe(), customization.inputs)
    tuned = customization.train(stage.path, Training(np.zeros(0, np.int64), config.seed), data=stage.path)
    folder = Path(workdir) / "custom"
    save_custom_diffusion(tuned, pipeline, str(folder), [config.token], overwrite=True)
    if not stage.finished:
        stage.finish()
    return folder


class Customization:
    """A fine-tune that is trained once or several times, with all exemplars or without some.

    Attributes:
      base, exemplars, config, prior: as `customize` takes them.
      inputs: fingerprints of model and images.
    """

    def __init__(
        self,
        base: Pipeline,
        exemplars: Dataset,
        config: CustomizeConfig,
        prior: Dataset | None = None,
        data: Path | None = None,
    ):
        """Checks all that `customize` refuses; `data` is the folder of latents, if not beside a training."""
        require_one_text_encoder(
            base,
            "Custom Diffusion, which learns the embedding of a new word,",
            "attribute a fine-tuned model of that family, or customise a Stable Diffusion 1 or 2 model",
        )
        check_finite("model", base.params)
        self.base, self.exemplars, self.config, self.prior = base, exemplars, config, prior
        self._start = _with_new_token(base, config)
        self._token_id = int(self._start.tokenizer.convert_tokens_to_ids(config.token))
        self._captions: dict[str, Any] = {
            "exemplars": [[config.caption] if config.caption else list(row) for row in _captions(exemplars)]
        }
        _check_captions(self._start, self._captions["exemplars"], self._token_id, config.token)
        self._sources = {"exemplars": exemplars}
        if prior is not None:
            self._captions["prior"], self._sources["prior"] = _captions(prior), prior
        for name, dataset in self._sources.items():
            _check_size(base, name, dataset)
        self.inputs = {name: dataset.fingerprint() for name, dataset in self._sources.items()}
        self.inputs["model"] = model_fingerprint(base)
        self._data = data
        self._batches: dict[str, DiffusionBatch] | None = None

    def train(
        self,
        path: str | os.PathLike,
        training: Training,
        description: str = "fine-tune",
        data: Path | None = None,
    ) -> Pipeline:
        """All steps, from the newest checkpoint in `path` -> the fine-tuned pipeline.

        Args:
          path: folder of checkpoints and `metrics.jsonl`.
          training: positions of the exemplars that it goes without, and its seed; the config's is not read.
          description: text of the progress bar.
          data: folder of latents, in place of that of the constructor.
        """
        check_removed(training.removed, len(self.exemplars))
        state, step, frozen = self._program(training, data)
        config = self.config
        run = FitConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
        )
        # Every step is given all exemplars and draws its rows from them.
        state = run_steps(path, step, state, lambda _: itertools.repeat(frozen), run, description)
        trained = jax.tree.map(np.asarray, state.params)
        rest = select_weights(self._start.params["unet"], _WEIGHTS)[1]
        joined = _join(trained, rest, self._start.params["text_encoder"], self._token_id)
        return dataclasses.replace(self._start, params=self._start.params | joined)

    def seconds_per_step(self, steps: int = 5) -> float:
        """Measured seconds of an optimiser step, without compiling."""
        state, step, frozen = self._program(Training(np.zeros(0, np.int64), self.config.seed))
        state, metrics = step(state, frozen)
        jax.block_until_ready(metrics)
        began = time.monotonic()
        for _ in range(steps):
            state, metrics = step(state, frozen)
        jax.block_until_ready(metrics)
        return (time.monotonic() - began) / steps

    def _encoded(self, data: Path | None) -> dict[str, DiffusionBatch]:
        folder = data or self._data
        if self._batches is None:
            if folder is None:
                raise ValueError("data is None; expected a folder for the latents of the exemplars")
            self._batches = {
                name: _encode(folder / name, self._start, dataset, self._captions[name], self.config.random_flips)
                for name, dataset in self._sources.items()
            }
        return self._batches

    def _program(self, training: Training, data: Path | None = None) -> tuple[TrainState, Any, _Frozen]:
        """The state before the first step, `(state, frozen) -> (state, metrics)`, and what a step reads."""
        start, config, batches = self._start, self.config, self._encoded(data)
        selected, rest = select_weights(start.params["unet"], _WEIGHTS)
        count = count_weights(selected)
        _log.info("fine-tuning %d matrices with %d values, and the token %s", *count, config.token)
        trained = {"unet": selected, "token": _embedding(start)[self._token_id]}
        mesh = data_mesh(jax.local_devices()[: usable_devices(config.batch_size, jax.local_device_count())])
        is_removed = np.isin(np.arange(len(self.exemplars)), training.removed)
        frozen = _Frozen(
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            prior_weight=config.prior_weight,
            rest=rest,
            text_params=start.params["text_encoder"],
            token_id=self._token_id,
            schedule=start.schedule,
            empty_ids=tokenize(start, [""])[0],
            exemplars=batches["exemplars"],
            prior=batches.get("prior"),
            is_removed=is_removed,
            kept=np.argsort(is_removed, kind="stable").astype(np.int32),
            num_kept=int(np.sum(~is_removed)),
        )
        state = init_state(trained, _optimizer(config.learning_rate, config.weight_decay))
        # Copies: a step may reuse the memory of the state that it is given, and the base must stay whole.
        state = replicate(mesh, jax.tree.map(np.array, state))
        frozen, key = replicate(mesh, (frozen, purpose_key(training.seed, "customize")))
        sharding = NamedSharding(mesh, PartitionSpec("data"))

        def step(state: TrainState, frozen: _Frozen) -> tuple[TrainState, dict[str, jax.Array]]:
            return _step(start.unet, start.text_encoder, sharding, config.batch_size, state, frozen, key)

        return state, step, frozen


def _captions(dataset: Dataset) -> list[tuple[str, ...]]:
    return [dataset.captions(index) for index in range(len(dataset))]


def _with_new_token(pipeline: Pipeline, config: CustomizeConfig) -> Pipeline:
    """The pipeline with the new token, its embedding that of the initializer token; an existing token is refused."""
    ids = pipeline.tokenizer(config.initializer_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = pipeline.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"initializer_token {config.initializer_token!r} is {len(ids)} tokens for this model: {', '.join(pieces)}; "
            "give one word that it knows whole, near the concept in meaning"
        )
    return add_tokens(pipeline, {config.token: np.asarray(_embedding(pipeline)[ids[0]])})


def _embedding(pipeline: Pipeline) -> Any:
    return traverse_util.flatten_dict(pipeline.params["text_encoder"])[_EMBEDDING]


def _check_captions(pipeline: Pipeline, captions: list[list[str]], token_id: int, token: str) -> None:
    """Raises ValueError unless every caption of the exemplars still holds the token when it is tokenized."""
    for row in captions:
        for text, ids in zip(row, tokenize(pipeline, row)):
            if token_id not in ids:
                why = "does not hold" if token not in text else "is cut off before"
                raise ValueError(
                    f"exemplar caption {text!r} {why} the token {token!r}, so the image would teach it nothing; "
                    "mend the captions, or give one for all with --exemplar_caption"
                )


def _check_size(pipeline: Pipeline, name: str, dataset: Dataset) -> None:
    expected = image_size(pipeline)
    found = dataset[0].image.shape[:2]
    if found != expected:
        raise ValueError(
            f"{name} {dataset.name!r} has images of {found} pixels (height, width); the model was trained on "
            f"{expected}. Open the data set with resolution={expected[0]}."
        )


def _encode(path: Path, pipeline: Pipeline, dataset: Dataset, captions: list, random_flips: bool) -> DiffusionBatch:
    latents = encode_images(path, dataset, pipeline.vae, pipeline.params["vae"], size=image_size(pipeline))
    skipped = read_skipped(path)
    if skipped:
        raise ValueError(f"{dataset.name!r} has images that cannot be read: {'; '.join(skipped.values())}")
    latents = np.asarray(latents)
    if not random_flips:
        # The loss draws one of the two at random: here both are the image as it is.
        latents = np.repeat(latents[:, :1], 2, axis=1)
    return DiffusionBatch(latents, *tokenize_captions(pipeline.tokenizer, captions))


def _optimizer(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """AdamW at a constant rate; the gradient's norm is clipped to 1, as in diffusers' Custom Diffusion training."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _step(unet, text_encoder, sharding, batch_size, state: TrainState, frozen: _Frozen, key: jax.Array):
    """One optimiser step -> new state and metrics; every draw is a function of the key and the step's number."""
    loss_fn = functools.partial(_loss, predictor(unet), text_encoder, sharding, batch_size)
    return train_step(loss_fn, _optimizer(frozen.learning_rate, frozen.weight_decay), 0.0, state, frozen, key)


def _loss(
    predict: Predict,
    text_encoder: CLIPTextModel,
    sharding: NamedSharding,
    batch_size: int,
    trained: dict[str, Any],
    frozen: _Frozen,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Denoising loss on a batch of exemplars, plus `prior_weight` times that on a batch of prior images."""
    params = _join(trained, frozen.rest, frozen.text_params, frozen.token_id)

    def batch_loss(data: DiffusionBatch, key: jax.Array, goes_without: bool = False) -> jax.Array:
        row_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (batch_size,), 0, len(data.latents))
        if goes_without:
            # Another one stands in where a removed exemplar comes up; all other places stay as they are.
            others = jax.random.randint(jax.random.fold_in(row_key, 1), (batch_size,), 0, frozen.num_kept)
            rows = jnp.where(frozen.is_removed[rows], frozen.kept[others], rows)
        batch = jax.lax.with_sharding_constraint(jax.tree.map(lambda leaf: leaf[rows], data), sharding)
        encode = functools.partial(encode_text, text_encoder)
        return diffusion_loss(
            predict, encode, frozen.schedule, params, batch, loss_key, frozen.empty_ids, caption_dropout=0.0
        )[0]

    exemplar_key, prior_key = jax.random.split(key)
    loss = exemplar_loss = batch_loss(frozen.exemplars, exemplar_key, goes_without=True)
    metrics = {"exemplar_loss": exemplar_loss}
    if frozen.prior is not None:
        metrics["prior_loss"] = batch_loss(frozen.prior, prior_key)
        loss = exemplar_loss + frozen.prior_weight * metrics["prior_loss"]
    return loss, metrics


def _join(trained: dict[str, Any], rest: Any, text_params: Any, token_id: jax.Array | int) -> dict[str, Any]:
    """The UNet's and text encoder's parameters with the trained ones in place."""
    text = traverse_util.flatten_dict(text_params)
    text[_EMBEDDING] = jnp.asarray(text[_EMBEDDING]).at[token_id].set(trained["token"])
    return {"unet": merge_weights(trained["unet"], rest), "text_encoder": traverse_util.unflatten_dict(text)}
