"""EKFAC of the selected weights over the training set.

Two passes over the same draws as the Fisher information's: the factors, whose eigenvectors are stored, then the
eigenvalues in their bases. Each pass resumes where it was stopped.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import (
    EKFAC,
    RELATIVE_DAMPING,
    Factors,
    LinearLayer,
    eigenbases,
    eigenvalue_sums,
    factor_sums,
    linear_layers,
    make_ekfac,
)
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.draws import (
    FisherDraws,
    GradientForm,
    Sample,
    as_fisher_sum,
    as_pair,
    fisher_draws,
    gradient_form,
    sample_loss,
    sum_over_draws,
    sums_like,
)
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.ops import prepare_kernels
from attrib_jax.ops.micro_batching import even_group_size, gradient_pixels, num_pixels, sum_groups
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.mesh import data_mesh, mesh_platform, replicate
from attrib_jax.parallel.sums import DeviceSums
from attrib_jax.storage.files import read_arrays, stored_arrays, write_arrays
from attrib_jax.storage.state import StateStore

_BASES, _EIGENVALUES = "bases.safetensors", "eigenvalues.safetensors"
_PARTIAL = "partial"  # the state of the eigenvalues' sum


def fit_ekfac(
    path: Path,
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    data: EncodedDataset,
    samples: int,
    seed: int,
    relative_damping: float = RELATIVE_DAMPING,
    mesh: Mesh | None = None,
) -> EKFAC:
    """EKFAC (METHOD.md section 10) of the selected weights, fitted and stored in `path`, or read from there.

    Kills change nothing, and another number of devices only the rounding within a tile, see `sum_over_draws`. With
    several hosts, host 0 takes the eigenvectors and writes, and all return the curvature.

    Args:
      path: the stage's folder.
      predict: the model; its linear layers have to be flax `nn.Dense` modules, called without `jit` inside.
      schedule: noise levels and prediction type.
      selected, rest: the two halves of the parameters.
      data: the encoded training set.
      samples: draws of each pass.
      seed: of the draws.
      relative_damping: see `EKFAC`; not part of what is stored.
      mesh: all devices if None.

    Raises:
      ValueError: no linear layer is selected, or one runs twice in a forward pass.
    """
    mesh = mesh or data_mesh()
    layers = _layers(predict, schedule, selected, rest, data)
    files = (path / _EIGENVALUES, path / _BASES)
    if not run_on_host0(lambda: all(stored_arrays(file) is not None for file in files)):
        draws = fisher_draws(seed, samples, data.num_captions, schedule.num_train_timesteps)
        prepared = prepare_kernels(rest, mesh_platform(mesh))
        shared = (selected, prepared, schedule, purpose_key(seed, "fisher"))
        if run_on_host0(lambda: stored_arrays(path / _BASES) is None):
            _fit_bases(path, predict, layers, shared, draws, data, mesh)
        _fit_eigenvalues(path, predict, layers, shared, draws, data, mesh)
    eigenvalues = Diagonal.from_flat(read_arrays(path / _EIGENVALUES)[0], like=selected)
    return make_ekfac(eigenvalues, jax.tree.map(jnp.asarray, _bases(path, selected)), layers, relative_damping)


def _layers(predict, schedule, selected, rest, data: EncodedDataset) -> tuple[LinearLayer, ...]:
    first, number = np.zeros(1, np.int64), jax.ShapeDtypeStruct((), np.int32)
    inputs = data.inputs(first, first, first)
    latents, text = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    sample = Sample(latents, text, number, number, None)
    return linear_layers(sample_loss(predict, schedule, purpose_key(0, "fisher")), selected, rest, sample)


def _fit_bases(path: Path, predict, layers, shared, draws: FisherDraws, data, mesh: Mesh) -> None:
    flat = flatten_names(sums_like(shared[0]))
    like = Factors(
        {layer.input: _square(flat[layer.input], 0) for layer in layers},
        {layer.name: _square(flat[layer.name], 1) for layer in layers},
    )
    program = _factor_program(predict, layers, mesh)
    total, state = sum_over_draws(path, "factors", program, replicate(mesh, shared), like, draws, data, "EKFAC factors")

    def store():
        bases = eigenbases(jax.tree.map(lambda high, low: np.asarray(high, np.float64) + low, *total))
        # Eigenvalues of other bases, or a part of their sum, would not fit.
        (path / _EIGENVALUES).unlink(missing_ok=True)
        StateStore(path, _PARTIAL).remove()
        write_arrays(path / _BASES, _to_flat(bases), {"samples": len(draws.index)})
        state.remove()

    run_on_host0(store)


def _fit_eigenvalues(path: Path, predict, layers, shared, draws: FisherDraws, data, mesh: Mesh) -> None:
    selected = shared[0]
    form = gradient_form(selected, mesh, data.latent_shape)
    program = _eigenvalue_program(predict, layers, mesh, form)
    like = (sums_like(selected), np.zeros((), np.int32))
    placed = replicate(mesh, (*shared, _bases(path, selected)))
    total, state = sum_over_draws(path, _PARTIAL, program, placed, like, draws, data, "EKFAC eigenvalues")

    def store():
        flat = as_fisher_sum(total).mean().to_flat()
        write_arrays(path / _EIGENVALUES, flat, {"samples": len(draws.index)})
        state.remove()

    run_on_host0(store)


@functools.lru_cache(maxsize=4)
def _factor_program(predict: Predict, layers: tuple[LinearLayer, ...], mesh: Mesh) -> DeviceSums:
    def tile_sum(shared, batch):
        selected, rest, schedule, key = shared
        loss_fn = sample_loss(predict, schedule, key)
        limit = gradient_pixels(mesh_platform(mesh))
        size = even_group_size(len(batch.mask), num_pixels(batch.latents.shape[1:]), limit)
        factors = sum_groups(
            lambda samples: factor_sums(loss_fn, layers, selected, rest, samples, samples.mask), batch, size
        )
        return CompensatedSum.of(factors)

    return DeviceSums(mesh, tile_sum)


@functools.lru_cache(maxsize=4)
def _eigenvalue_program(
    predict: Predict, layers: tuple[LinearLayer, ...], mesh: Mesh, form: GradientForm
) -> DeviceSums:
    def tile_sum(shared, batch):
        selected, rest, schedule, key, bases = shared
        loss_fn = sample_loss(predict, schedule, key)
        fixed = (layers, bases, selected, rest, batch, batch.mask)
        return as_pair(eigenvalue_sums(loss_fn, *fixed, form.microbatch, form.factored))

    return DeviceSums(mesh, tile_sum)


def _square(kernel: np.ndarray, axis: int) -> np.ndarray:
    return np.zeros((kernel.shape[axis],) * 2, kernel.dtype)


def _bases(path: Path, selected: Any) -> Factors:
    """The stored eigenvectors, in the dtype that the weights are summed in."""
    dtype = jnp.result_type(*jax.tree.leaves(selected), jnp.float32)
    bases = Factors({}, {})
    for name, array in read_arrays(path / _BASES)[0].items():
        part, _, layer = name.partition("/")
        getattr(bases, part)[layer] = array.astype(dtype)
    return bases


def _to_flat(bases: Factors) -> dict[str, np.ndarray]:
    return {f"{part}/{name}": x for part, arrays in bases._asdict().items() for name, x in arrays.items()}
