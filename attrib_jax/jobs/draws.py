"""Sums over random draws of the training set, as curvature is fitted: on all devices, checkpointed and resumed."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.weights import count_weights, flatten_names, merge_weights
from attrib_jax.curvature.fisher import FisherSum, TokenProduct, factored_gradients
from attrib_jax.diffusion.losses import Predict, batch_losses, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.models.predictor import as_predictor
from attrib_jax.models.projected_text import kernel_gradient
from attrib_jax.models.unet import TEXT_KERNELS
from attrib_jax.ops.micro_batching import even_group_size, gradient_pixels, num_pixels
from attrib_jax.ops.shards import gather, map_parameters
from attrib_jax.parallel.hosts import fetch, is_host0, on_host_memory, run_on_host0
from attrib_jax.parallel.mesh import host_share, mesh_platform, num_parts, shard_batch
from attrib_jax.parallel.progress import progress
from attrib_jax.parallel.sums import DeviceSums
from attrib_jax.storage.state import StateStore

# Samples that one call of the program takes on each device. A core runs them in groups that follow each other
# (`gradient_form`) in the same memory, which is mapped anew at every call; an accelerator has to be filled.
_SAMPLES_PER_CPU, _SAMPLES_PER_ACCELERATOR = 32, 64
# The memory that the gradients of a tile may fill.
_GRADIENT_BYTES = 2**30
# Storing the sums so far takes half a second, in which an accelerator could do many samples.
_CHECKPOINT_TILES_ON_CPU, _CHECKPOINT_TILES_ON_ACCELERATOR = 16, 64


class FisherDraws(NamedTuple):
    """One (image, flip, caption, timestep, noise) draw for each sample; arrays (S,), the noise by its index."""

    index: np.ndarray  # type: ignore[assignment]  # tuple.index is not used
    row: np.ndarray
    flip: np.ndarray
    caption: np.ndarray
    timestep: np.ndarray


class Sample(NamedTuple):
    """What a draw gives the model; `mask` is 1 for a sample, 0 for padding."""

    latents: Any
    text: Any
    index: Any
    timestep: Any
    mask: Any


def fisher_draws(seed: int, samples: int, num_captions: np.ndarray, num_train_timesteps: int) -> FisherDraws:
    """The first `samples` draws: every image once, in random order, before any comes twice.

    Draws are a function of the seed and their index, so more samples extend fewer.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xF15]))
    rows, flips, captions, timesteps = [], [], [], []
    for _ in range(-(-samples // len(num_captions))):
        order = generator.permutation(len(num_captions))
        rows.append(order)
        flips.append(generator.integers(0, 2, len(order)))
        captions.append(generator.integers(0, num_captions[order]))
        timesteps.append(generator.integers(0, num_train_timesteps, len(order)))
    cut = (np.concatenate(parts)[:samples].astype(np.int32) for parts in (rows, flips, captions, timesteps))
    return FisherDraws(np.arange(samples, dtype=np.int32), *cut)


def sample_loss(predict: Predict, schedule: NoiseSchedule, key: jax.Array) -> Callable[[Any, Any, Sample], jax.Array]:
    """`loss_fn(selected, rest, sample) -> ()`: the loss of one draw, its noise a function of `key` and its index."""

    def loss_fn(selected, rest, sample):
        noise, params = _noise(key, sample)[None], merge_weights(selected, rest)
        return denoising_losses(predict, params, schedule, sample.latents, sample.text, noise, sample.timestep[None])[0]

    return loss_fn


def sample_gradients(
    predict: Predict, schedule: NoiseSchedule, key: jax.Array, factored: bool = False
) -> Callable[[Any, Any, tuple[Sample, jax.Array]], Any]:
    """`gradients(selected, rest, (samples, columns))`, the gradient of `sample_loss` of each of several, in one tree.

    `columns` (B, D, L) are the samples' text states, transposed (`kernel_gradient`). Where the selected weights all
    project the text, the model runs once on the batch, and not under `vmap`, whose additional axes cost copies. With
    `factored`, gradients by kernels are `TokenProduct`s where the layer has few tokens.
    """

    def gradients(selected, rest, inputs):
        samples, columns = inputs
        weights = as_predictor(predict).project_text(selected, samples.text)
        if weights.others or not weights.projections:
            loss_fn = sample_loss(predict, schedule, key)
            if factored:
                # What layers read is recorded as they run, which the rules of a backward pass that gathers again
                # would not allow: all weights are whole here.
                return factored_gradients(loss_fn, selected, gather(rest), samples)
            return jax.vmap(jax.grad(loss_fn), (None, None, 0))(selected, rest, samples)
        noise = jax.vmap(functools.partial(_noise, key))(samples)

        def loss_sum(weights):
            text = weights.text(samples.text)
            losses = batch_losses(predict, rest, schedule, samples.latents, text, noise, samples.timestep)
            return jnp.sum(losses)

        gradient = jax.grad(loss_sum)(weights)
        if not factored:
            return kernel_gradient(gradient, selected, columns)
        return jax.tree.map(lambda cotangents: TokenProduct(columns, cotangents), gradient.projections)

    return gradients


def _noise(key: jax.Array, sample: Sample) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, sample.index), (1, *sample.latents.shape))[0]


def sum_over_draws(
    path: Path,
    name: str,
    program: DeviceSums,
    shared: Any,
    like: Any,
    draws: FisherDraws,
    data: EncodedDataset,
    description: str,
) -> tuple[CompensatedSum, StateStore]:
    """Sums `program` over all draws, resuming from the state in `path/name`.

    Every device keeps the compensated sum of its tiles; at a checkpoint these are added in device order. So kills
    change nothing, and another number of devices only the rounding within a tile. With several hosts each reads its
    share of every tile, and host 0 keeps the total and writes.

    Args:
      path, name: of the folder of the state.
      program: the compiled sum of a tile of `Sample`s.
      shared: from `replicate` or `place_parameters`.
      like: the tree that is summed, for its layout, shapes and dtypes; `Shard`s as in `DeviceSums.zero`.
      draws: all of them.
      data: where they are taken from.
      description: of the progress.

    Returns:
      The sum, on host 0 (a part of it on the others), and the state, to be removed when the sum is stored elsewhere.
    """
    mesh, samples = program.mesh, len(draws.index)
    total = _Total(path, name, map_parameters(lambda node: getattr(node, "value", node), like))
    start = run_on_host0(total.read)
    size = samples_per_tile(mesh) * mesh.size
    share = host_share(mesh, size)
    running = program.zero(like)
    with progress(samples, description, "sample", initial=start) as bar:
        since = 0
        while start < samples:
            places = np.arange(start, start + size)[share]
            taken = np.minimum(places, samples - 1)
            row, flip, caption = draws.row[taken], draws.flip[taken], draws.caption[taken]
            latents, text = data.inputs(row, flip, caption)
            batch = Sample(
                latents=latents,
                text=text,
                index=draws.index[taken],
                timestep=draws.timestep[taken],
                mask=(places < samples).astype(np.float32),
            )
            running = program.add(running, shared, shard_batch(mesh, batch))
            done = min(size, samples - start)
            start, since = start + done, since + 1
            if since == tiles_per_checkpoint(mesh) or start == samples:
                part = program.total(running)
                if num_parts(mesh) == 1:
                    total.add(part)
                else:
                    # Leaf by leaf into this host's memory: no device has room for the whole.
                    part = jax.tree.map(fetch, part)
                    with on_host_memory():
                        total.add(part)
                run_on_host0(functools.partial(total.write, start))
                running, since = program.zero(like), 0
            bar.update(done)
    return total.sum, total.state


class _Total:
    """The sum up to the last checkpoint, kept by host 0 in memory and on disk."""

    def __init__(self, path: Path, name: str, like: Any):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        self.sum = CompensatedSum(zeros, zeros)
        self.state = StateStore(path, name)

    def read(self) -> int:
        """Takes up the stored sum -> the number of samples in it."""
        stored = self.state.read(self.sum)
        if stored is None:
            return 0
        self.sum, samples = stored
        return samples

    def add(self, part: CompensatedSum) -> None:
        """Adds what all devices have summed since the last checkpoint."""
        if is_host0():
            self.sum = jax.tree.map(np.asarray, _add(self.sum, part))

    def write(self, samples: int) -> None:
        """Stores the sum of the first `samples` samples."""
        self.state.write(self.sum, samples)


@jax.jit
def _add(total: CompensatedSum, part: CompensatedSum) -> CompensatedSum:
    return total + part


def samples_per_tile(mesh: Mesh) -> int:
    """Samples that each device of `mesh` takes in one call."""
    return _SAMPLES_PER_CPU if _on_cpu(mesh) else _SAMPLES_PER_ACCELERATOR


def tiles_per_checkpoint(mesh: Mesh) -> int:
    """Calls after which the sums so far are stored."""
    return _CHECKPOINT_TILES_ON_CPU if _on_cpu(mesh) else _CHECKPOINT_TILES_ON_ACCELERATOR


def _on_cpu(mesh: Mesh) -> bool:
    return mesh_platform(mesh) == "cpu"


class GradientForm(NamedTuple):
    """How per-sample gradients are held.

    Attributes:
      microbatch: how many one device holds at once, a divisor of its tile.
      factored: whether those by kernels are factors where these are smaller, see `factored_gradients`.
    """

    microbatch: int
    factored: bool


def gradient_form(selected: Any, mesh: Mesh, latent_shape: tuple[int, ...]) -> GradientForm:
    """How a device of `mesh` holds gradients by the selected weights: dense if those of a micro-batch have room."""
    limit = gradient_pixels(mesh_platform(mesh))
    microbatch = even_group_size(samples_per_tile(mesh), num_pixels(latent_shape), limit)
    factored = microbatch * 4 * count_weights(selected).values > _GRADIENT_BYTES
    # What projects the text has few tokens; what else is selected may stay dense.
    rest = {name: x for name, x in flatten_names(selected).items() if not name.endswith(TEXT_KERNELS)}
    while microbatch > 1 and microbatch * 4 * count_weights(rest).values > _GRADIENT_BYTES:
        microbatch //= 2
    return GradientForm(microbatch, factored)


def sums_like(selected: Any) -> Any:
    """Zeros in the layout of the selected weights, in the dtype that their squares are summed in."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), selected)


def as_pair(part: FisherSum) -> CompensatedSum:
    """A sum of squares and its count as devices add them."""
    return CompensatedSum((part.sum, part.count), (part.compensation, jnp.zeros_like(part.count)))


def as_fisher_sum(pair: CompensatedSum) -> FisherSum:
    """The inverse of `as_pair`."""
    (total, count), (compensation, _) = pair
    return FisherSum(total, count, compensation)
