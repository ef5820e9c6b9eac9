"""Curvature of the loss over the training set: the diagonal Fisher information or EKFAC, fitted, reused or given."""

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.keys import purpose_key
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.curvature.fisher import sum_squares
from attrib_jax.curvature.fisher_files import FISHER_FILE, fisher_file, read_fisher_file
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.draws import (
    GradientForm,
    Sample,
    as_fisher_sum,
    as_pair,
    fisher_draws,
    gradient_form,
    sample_gradients,
    sum_over_draws,
    sums_like,
)
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.settings import CurvatureSettings
from attrib_jax.models.projected_text import text_columns
from attrib_jax.ops import prepare_kernels
from attrib_jax.ops.shards import gather
from attrib_jax.parallel.hosts import on_host_memory, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, mesh_platform, num_parts, place_parameters, replicate
from attrib_jax.parallel.sums import DeviceSums, divided_like
from attrib_jax.storage.files import DamagedFileError, write_arrays
from attrib_jax.storage.state import StateStore

_log = logging.getLogger(__name__)

_PARTIAL = "partial"


def fit_curvature(run: Run, config: CurvatureSettings) -> Diagonal | EKFAC:
    """F of the selected weights: fitted, reused, or from the file that `config.fisher` names.

    EKFAC and the diagonal take the same draws; the relative damping of EKFAC is no part of what is stored. The diagonal
    lies on the devices as the weights do, see `Run.mesh`.
    """
    mesh = run.mesh(config)
    selected, rest = run.select(config.weights)
    if config.fisher is not None:
        return load_fisher(fisher_file(config.fisher), selected, mesh)
    samples, seed = config.fisher_samples, config.loss_seed
    settings = {"weights": config.weights, "samples": samples, "seed": seed}
    kind = "ekfac" if config.curvature == "ekfac" else "fisher"
    stage = (f"{kind}/{config.weights}-{samples}-seed{seed}", settings, run.inputs)
    fixed = (run.predict, run.pipeline.schedule, selected, rest, run.data, samples, seed)
    with run.timed(kind, run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        if kind == "ekfac":
            from attrib_jax.jobs.ekfac import fit_ekfac

            return fit_ekfac(opened.path, *fixed, config.ekfac_damping)
        return fit_fisher(opened.path, *fixed, mesh)


def fit_fisher(
    path: Path,
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    data: EncodedDataset,
    samples: int,
    seed: int,
    mesh: Mesh | None = None,
) -> Diagonal:
    """Sums squared per-sample gradients (METHOD.md section 3), resuming from the state in `path`, and stores F there.

    Kills change nothing, and another number of devices only the rounding within a tile, see `sum_over_draws`. With
    several hosts all return F. On a mesh with the axis `model` the sum is divided as the weights are, and so is F; the
    gradients of a micro-batch are not.
    """
    mesh = mesh or data_mesh()
    file = path / FISHER_FILE
    if run_on_host0(lambda: _is_fitted(file, selected)):
        # What a kill right after storing the result left.
        run_on_host0(StateStore(path, _PARTIAL).remove)
    else:
        _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh)
    return load_fisher(file, selected, mesh)


def _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh) -> None:
    draws = fisher_draws(seed, samples, data.num_captions, schedule.num_train_timesteps)
    prepared = prepare_kernels(rest, mesh_platform(mesh))
    weights = place_parameters(mesh, (selected, prepared))
    shared = (*weights, *replicate(mesh, (schedule, purpose_key(seed, "fisher"))))
    program = fisher_sums(predict, mesh, gradient_form(selected, mesh, data.latent_shape))
    like = (divided_like(mesh, sums_like(selected)), np.zeros((), np.int32))
    total, state = sum_over_draws(path, _PARTIAL, program, shared, like, draws, data, "Fisher information")

    def store():
        write_arrays(path / FISHER_FILE, as_fisher_sum(total).mean().to_flat(), {"samples": samples})
        state.remove()

    with contextlib.nullcontext() if num_parts(mesh) == 1 else on_host_memory():
        run_on_host0(store)


@functools.lru_cache(maxsize=4)
def fisher_sums(predict: Predict, mesh: Mesh, form: GradientForm) -> DeviceSums:
    """The compiled sum over tiles, made once: fitting again with the same model compiles nothing."""
    return DeviceSums(mesh, functools.partial(_tile_sum, predict, form, mesh), takes_shards=True)


def _tile_sum(predict: Predict, form: GradientForm, mesh: Mesh, shared: Any, batch: Sample) -> CompensatedSum:
    """The sum over one device's tile."""
    selected, rest, schedule, key = shared
    # An example's gradient by a weight is squared when it is complete, so the weights that it is taken by are whole.
    selected = gather(selected)
    gradients = sample_gradients(predict, schedule, key, form.factored)
    inputs = batch, text_columns(batch.text)
    sums = sum_squares(
        gradients, selected, rest, inputs, mask=batch.mask, microbatch=form.microbatch,
        like=divided_like(mesh, selected) if num_parts(mesh) > 1 else None,
    )  # fmt: skip
    return as_pair(sums)


def _is_fitted(file: Path, selected: Any) -> bool:
    try:
        load_fisher(file, selected)
    except FileNotFoundError:
        return False
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
        return False
    return True


def load_fisher(file: Path, selected: Any, mesh: Mesh | None = None) -> Diagonal:
    """Reads F for the selected weights, from a file of ours or one by PyTorch names (see `read_fisher_file`).

    On a `mesh` with the axis `model` it is divided as the weights are.

    Raises ValueError listing both sides where names or shapes differ, or naming a tensor with an impossible value.
    """
    flat = read_fisher_file(file, selected)
    try:
        if mesh is None or num_parts(mesh) == 1:
            return Diagonal.from_flat(flat, like=selected)
        with on_host_memory():
            curvature = Diagonal.from_flat(flat, like=selected)
        return place_parameters(mesh, curvature)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
