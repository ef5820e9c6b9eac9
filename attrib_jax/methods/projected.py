"""TRAK, Journey-TRAK, D-TRAK and DAS: kernels of projected gradients, METHOD.md sections 7 and 10.

Each scores tau(z_hat, z_i) = phi(z_hat)^T (Phi^T Phi + lambda I)^-1 phi(z_i), with phi the projected gradient of an
output of the model by the selected weights, averaged over timesteps:

- `trak` (Park et al. 2023, "TRAK: Attributing Model Behavior at Scale"): of the training loss.
- `journey-trak` (Georgiev et al. 2023, "The Journey, Not the Destination"): as TRAK, the query's loss at one timestep.
- `d-trak` (Zheng et al. 2024, "Intriguing Properties of Data Attribution on Diffusion Models"): of the mean square of
  the prediction, with no factor for the loss's derivative.
- `das` (Lin et al. 2024, "Diffusion Attribution Score"): of the prediction's mean, gradients brought to length 1 at
  each timestep; tau is multiplied by the training example's residual r_i and, on demand, divided by 1 - h_i.

Phi has a row for each image and mirror image that is scored. Training features are a stage that all queries share,
and all methods with one output. A query's features are averaged over `query_draws` draws of (timestep, noise), in whole
rounds over the timesteps. Scores of several models are averaged.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.kernel import Kernel, fit_kernel, kernel_scores, leverages
from attrib_jax.attribution.projection import PROJECTIONS, check_projection, project, sketch, sketched_numbers
from attrib_jax.attribution.scores import make_scores
from attrib_jax.convert.load import load_pipeline, load_unet
from attrib_jax.core.checks import check_range
from attrib_jax.core.fingerprint import files_digest, params_fingerprint
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Batch, Scores
from attrib_jax.core.weights import Params, count_weights, merge_weights, select_weights
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs.context import Run, model_fingerprint
from attrib_jax.jobs.encoded_dataset import EncodedDataset, encoded_queries
from attrib_jax.jobs.losses import ExampleProgram, num_captions
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.jobs.settings import LossSettings, QueryDrawSettings, WeightSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.models.predictor import cast_params, predictor
from attrib_jax.ops import prepare_kernels
from attrib_jax.ops.micro_batching import (
    GRADIENT_PIXELS,
    even_group_size,
    gradient_pixels,
    map_groups,
    num_pixels,
)
from attrib_jax.parallel.hosts import host0_first, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, mesh_platform
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import stored_arrays, write_arrays
from attrib_jax.storage.joined import PackedRows, pack_rows

# The model output whose gradients a method compares, see `attrib_jax.attribution.outputs`.
OUTPUTS = {"trak": "loss", "journey-trak": "loss", "d-trak": "square", "das": "mean"}

_KERNEL_FILE = "kernel.safetensors"
_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
# Row ids of a query's rounds count down from here, so that they share no noise with training images.
_LAST_ROW_ID = 2**31 - 1
# UNet forwards whose activations a device holds at once: a core is as fast with few; an accelerator has to be filled.
_FORWARDS_PER_CPU, _FORWARDS_PER_ACCELERATOR = 40, 320
# Their latent pixels: a tile of a model with large latents is taken in parts.
_PIXELS_AT_ONCE = 4 * GRADIENT_PIXELS
# The memory that the gradients of a tile may fill.
_GRADIENT_BYTES = 2**30
_MAX_ROWS_PER_CHUNK = 256
_CHUNK_BYTES = 2**26


def unet_folder(path: str | os.PathLike) -> Path:
    """The folder with the UNet of a model of an ensemble; FileNotFoundError where there is none."""
    folder = Path(path) / "unet" if (Path(path) / "model_index.json").is_file() else Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"ensemble holds {path!r}: expected a pipeline folder, or a UNet folder with config.json and weights"
        )
    return folder


def _ensemble_digest(paths: Sequence[str]) -> list[str]:
    """Digest of the files of each model of an ensemble, in an order that does not depend on theirs."""
    folders = map(unet_folder, paths)
    return sorted(files_digest(sorted(path for path in folder.iterdir() if path.is_file())) for folder in folders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedConfig(MethodConfig, WeightSettings, QueryDrawSettings, LossSettings):
    """Settings of the methods that compare projected per-example gradients."""

    method: str = setting("trak", "Attribution method.", choices=tuple(OUTPUTS))
    projection: str = setting("sparse", "Random projection of the gradients.", choices=tuple(PROJECTIONS))
    projection_dim: int = setting(2048, "Projection dimension of the gradients.", low=1, symbol="k")
    projection_seed: int = setting(
        0, "Seed of the projection; every model of an ensemble has one of its own made from it.", low=0, high=2**32 - 1
    )
    projection_side: int = setting(
        128,
        "Numbers that each longer side of a weight matrix is sketched to before the factored projection.",
        low=1,
        only_if=("projection", "factored"),
    )
    features_dtype: str = setting(
        "float32",
        "How the training images' projected gradients are stored: as they are, or packed in half or a quarter of the "
        "bytes, with a scale for each image.",
        choices=tuple(_DTYPES),
        omit_default=True,
    )
    regularisation: float = setting(
        0.1, "Regularisation of the kernel, in units of its mean eigenvalue.", above=0, symbol="lambda"
    )
    journey_timestep: int = setting(
        400, "Timestep of the query's loss in journey-trak.", low=0, only_if=("method", "journey-trak")
    )
    das_leverage: bool = setting(
        False, "Whether das divides by 1 - h_i, the leverage of each training example.", only_if=("method", "das")
    )
    ensemble: tuple[str, ...] = setting(
        (),
        "Folders of further models trained on the same data set, whose scores are averaged with the model's: UNet "
        "folders, or pipeline folders with the same autoencoder and text encoder.",
        path=True,
        content=_ensemble_digest,
    )

    def __post_init__(self):
        super().__post_init__()
        check_projection(self.projection, self.projection_dim)
        repeated = sorted({path for path in self.ensemble if self.ensemble.count(path) > 1})
        if repeated:
            raise ValueError(f"ensemble holds {repeated[0]!r} more than once: expected each model once.")


def check(run: Run, config: ProjectedConfig) -> None:
    """Raises ValueError where the schedule has no such timestep."""
    last = run.pipeline.schedule.num_train_timesteps - 1
    if config.method == "journey-trak":
        check_range("journey_timestep", config.journey_timestep, 0, last, integer=True)


class Member(NamedTuple):
    """A model whose scores are averaged: its weights, what its features are made from, and its projection's seed."""

    params: Any
    inputs: Mapping[str, str]
    projection_seed: int
    suffix: str


class TrainingFeatures(NamedTuple):
    """Features of the data set under one model.

    Attributes:
      weights: `(selected, rest, projection key)`, what the compiled program takes.
      features: (N, flips, k) float32, on disk.
      residuals: (N, flips) float32; None for outputs without.
      kernel_file: file of the kernel's eigendecomposition.
    """

    weights: tuple[Params, Params, jax.Array]
    features: Any
    residuals: np.ndarray | None
    kernel_file: Path


def prepare(run: Run, config: ProjectedConfig) -> list[TrainingFeatures]:
    """Features of the data set under the model and those of the ensemble, computed, resumed or reused."""
    return [_training_features(run, member, config) for member in _members(run, config)]


def score(run: Run, queries: Sequence[QueryJob], config: ProjectedConfig) -> list[Scored]:
    """Scores by a kernel of projected gradients, see the module."""
    prepared = [query.prepared for query in queries]
    (scores,) = scores_by_regularisation(run, prepared, config, [config.regularisation])
    return [Scored(each) for each in scores]


def scores_by_regularisation(
    run: Run, queries: Sequence[PreparedQuery], config: ProjectedConfig, regularisations: Sequence[float]
) -> list[list[Scores]]:
    """Scores for each regularisation, in place of that of `config`, and each query.

    All come from the same features and one eigendecomposition a model, so that the regularisation can be chosen on
    held-out queries at the cost of one.
    """
    members = prepare(run, config)
    values = np.sum([_member_values(run, member, queries, config, regularisations) for member in members], axis=0)
    row_ids = run.data.row_ids
    return [[make_scores(row_ids, each / len(members), None, config.flips) for each in at_one] for at_one in values]


def _training_features(run: Run, member: Member, config: ProjectedConfig) -> TrainingFeatures:
    weights = feature_weights(member.params, config, member.projection_seed)
    stage = _stage(config, member)
    reused, data = run.root.is_finished(*stage), run.data
    with run.timed("features", reused), run.root.stage(*stage) as opened:
        program = feature_program(run, config)
        features, residuals = dataset_features(opened.path, program, weights, data, "projected gradients")
        kernel_file = opened.path / _KERNEL_FILE
        run_on_host0(functools.partial(_store_kernel, kernel_file, features))
    return TrainingFeatures(weights, features, residuals, kernel_file)


def feature_weights(params: Any, config: ProjectedConfig, projection_seed: int) -> tuple[Params, Params, jax.Array]:
    """What `feature_program` takes, `(selected, rest, projection key)`, from the denoiser's parameters."""
    selected, _ = select_weights(params, config.weights)
    _, rest = select_weights(cast_params(params, config.precision), config.weights)
    return selected, prepare_kernels(rest, mesh_platform(data_mesh())), purpose_key(projection_seed, "projection")


def _member_values(run: Run, member: TrainingFeatures, queries, config: ProjectedConfig, regularisations) -> np.ndarray:
    """(len(regularisations), Q, N, flips) float64 of one model."""
    with run.timed("query gradients"):
        # A query is taken as it is, with its own prompt.
        own = dataclasses.replace(config, flips="none", captions="first")
        program = feature_program(run, own, config.journey_timestep if config.method == "journey-trak" else None)
        query_features = _query_features(program, member.weights, queries, config)
    with run.timed("kernel"):

        def compare() -> np.ndarray:
            kernel = _read_kernel(member.kernel_file)
            values = kernel_scores(member.features, query_features, regularisations, kernel)
            if member.residuals is not None:
                values *= member.residuals
            if config.das_leverage:
                for at_one, regularisation in zip(values, regularisations):
                    at_one /= 1 - leverages(member.features, kernel, regularisation)
            return values

        return run_on_host0(compare)


def feature_program(run: Run, config: ProjectedConfig, timestep: int | None = None) -> ExampleProgram:
    """The compiled projected gradients of a method's output; its weights are `(selected, rest, projection key)`.

    Results are (rows, flips, k), and (rows, flips, k + 1) for the output `mean`, whose last number is the residual.
    `timestep` is the only one, instead of the strided ones.
    """
    output, schedule, mesh = OUTPUTS[config.method], run.pipeline.schedule, data_mesh()
    with_residual = output == "mean"
    if timestep is None:
        timesteps = strided_timesteps(config.stride, schedule.num_train_timesteps)
    else:
        timesteps = np.array([timestep], np.int32)
    # For `mean` every timestep has a gradient of its own.
    selected = run.select(config.weights)[0]
    side = config.projection_side if config.projection == "factored" else 0
    numbers = sketched_numbers(selected, side) if side else count_weights(selected).values
    numbers *= len(timesteps) if with_residual else 1
    predict = predictor(run.pipeline.unet, config.precision)
    tile = _examples_per_tile(mesh, len(timesteps), numbers)
    # A core's caches hold few activations; an accelerator has to be filled.
    limit = gradient_pixels("cpu") if mesh_platform(mesh) == "cpu" else _PIXELS_AT_ONCE
    at_once = even_group_size(tile, len(timesteps) * num_pixels(run.data.latent_shape), limit)
    return ExampleProgram(
        _features,
        schedule,
        config,
        mesh,
        (config.projection_dim + with_residual,),
        timesteps,
        tile,
        static=(predict, config.precision, output, config.projection, config.projection_dim, side, at_once),
    )


def _features(
    predict,
    precision: str,
    output: str,
    projection: str,
    projection_dim: int,
    side: int,
    at_once: int,
    shared,
    batch: Batch,
) -> jax.Array:
    from attrib_jax.attribution.outputs import output_gradients

    schedule, key, timesteps, (selected, rest, projection_key) = shared

    def merge(selected):
        return cast_params(merge_weights(selected, rest), precision)

    # Sides are sketched example by example: a dense gradient of a large model is never formed.
    reduce = (lambda gradient, columns: sketch(gradient, columns, projection_key, side)) if side else None

    def group(examples):
        return output_gradients(output, predict, schedule, merge, selected, rest, key, examples, timesteps, reduce)

    gradients, residuals = map_groups(group, at_once, batch)
    projected = project(gradients, projection_key, projection, projection_dim)
    if output != "mean":
        return projected
    return jnp.concatenate([projected, residuals[:, None].astype(projected.dtype)], axis=1)


def _examples_per_tile(mesh: Mesh, num_timesteps: int, numbers: int) -> int:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    forwards = _FORWARDS_PER_CPU if on_cpu else _FORWARDS_PER_ACCELERATOR
    return max(1, min(forwards // num_timesteps, _GRADIENT_BYTES // (4 * numbers)))


def dataset_features(
    path: Path, program: ExampleProgram, weights: Any, data: EncodedDataset, description: str
) -> tuple[Any, np.ndarray | None]:
    """A program's results on a data set, kept in chunks under `path` and resumed there.

    Returns features (N, flips, k) float32, on disk, maybe packed there, of which slices are read, and the residuals
    (N, flips) float32 in memory, None for outputs without. With several hosts, host 0 decides what is missing and
    writes.

    Raises ValueError where a feature is NaN or infinite.
    """
    config: Any = program.config
    flips, dim = config.num_flips, config.projection_dim
    packed = config.features_dtype != "float32"
    fields: dict[str, Any] = {"features": ((flips, dim), _DTYPES[config.features_dtype])}
    if packed:
        fields["scale"] = ((flips,), np.float32)
    with_residual = program.result_shape[0] > dim
    if with_residual:
        fields["residual"] = ((flips,), np.float32)
    rows_per_chunk = max(1, min(_MAX_ROWS_PER_CHUNK, _CHUNK_BYTES // (4 * flips * dim)))
    store = host0_first(lambda: ChunkStore(path, fields, len(data), rows_per_chunk, name="features"))
    missing = store.pending_chunks()
    counts = num_captions(data, np.arange(len(data)), program.config) * flips * program.num_timesteps
    left = sum(int(counts[store.rows(index)].sum()) for index in missing)
    weights = program.place(weights) if missing else None
    with progress(int(counts.sum()), description, "forward", initial=int(counts.sum()) - left) as bar:
        for index in missing:
            values = program(weights, data, np.arange(len(data))[store.rows(index)], bar.update)
            run_on_host0(functools.partial(store.write, index, _pack(config, with_residual, values)))
    features: Any = store.array("features")
    if packed:
        features = PackedRows(features, np.asarray(store.array("scale")))
    return features, np.asarray(store.array("residual")) if with_residual else None


def _pack(config: Any, with_residual: bool, values: np.ndarray) -> dict[str, np.ndarray]:
    if not np.isfinite(values).all():
        raise ValueError(
            "projected gradients are NaN or infinite: look for a damaged model, or keep precision='float32'"
        )
    values, dim = values.astype(np.float32), config.projection_dim
    residual = {"residual": values[..., dim]} if with_residual else {}
    if config.features_dtype == "float32":
        return {"features": values[..., :dim]} | residual
    features, scale = pack_rows(values[..., :dim], _DTYPES[config.features_dtype])
    return {"features": features, "scale": scale} | residual


def _query_features(program, weights, queries: Sequence[PreparedQuery], config: ProjectedConfig) -> np.ndarray:
    """(Q, k) float64: each query's gradient, averaged over its draws, projected."""
    rounds = -(-config.query_draws // program.num_timesteps)
    weights = program.place(weights)
    result = []
    with progress(len(queries) * rounds * program.num_timesteps, "query gradients", "draw") as bar:
        for query in queries:
            one = encoded_queries(
                np.zeros(1, np.int32),
                query.latents[None],
                jax.tree.map(lambda leaf: leaf[None], query.text),
                "the query",
            )
            row_ids = np.arange(_LAST_ROW_ID, _LAST_ROW_ID - rounds, -1, dtype=np.int32)
            data = dataclasses.replace(one, row_ids=row_ids, positions=np.zeros(rounds, np.int64))
            values = program(weights, data, np.arange(rounds), bar.update)
            result.append(values.mean(axis=(0, 1))[: config.projection_dim])
    return np.stack(result)


def _stage(config: ProjectedConfig, member: Member) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """Name, settings and inputs of the training features."""
    output = OUTPUTS[config.method]
    names = ("weights", "loss_seed", "stride", "captions", "num_flips", "projection", "projection_dim")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"output": output, "projection_seed": member.projection_seed}
    name = (
        f"features/{output}-{config.weights}-{config.projection}{config.projection_dim}"
        f"-seed{config.projection_seed}-stride{config.stride}-{config.captions}-flips{config.num_flips}"
        f"-seed{config.loss_seed}"
    )
    if config.projection == "factored":
        name, settings = f"{name}-side{config.projection_side}", {**settings, "projection_side": config.projection_side}
    for kind in ("precision", "features_dtype"):
        if (value := getattr(config, kind)) != "float32":
            word = f"stored-{value}" if kind == "features_dtype" else value
            name, settings = f"{name}-{word}", {**settings, kind: value}
    return name + member.suffix, settings, member.inputs


def _members(run: Run, config: ProjectedConfig) -> list[Member]:
    """The model, and those of the ensemble, each with a projection of its own that does not depend on their order."""
    pipeline, seed = run.pipeline, config.projection_seed
    members = [Member(pipeline.params["unet"], run.inputs, seed, "")]
    for path in config.ensemble:
        params = _load_unet(path, pipeline)
        fingerprint = model_fingerprint(dataclasses.replace(pipeline, params=pipeline.params | {"unet": params}))
        own_seed = (seed + int(fingerprint[:8], 16)) % 2**32
        inputs = {**run.inputs, "model": fingerprint}
        members.append(Member(params, inputs, own_seed, f"-model-{fingerprint[:8]}"))
    return members


def _load_unet(path: str, pipeline) -> Any:
    """The UNet parameters of a model of the ensemble; ValueError where it does not share the encoded data set."""
    folder = unet_folder(path)
    if folder != Path(path):
        other = load_pipeline(path)
        for part in (part for part in pipeline.params if part != "unet"):
            if part not in other.params or params_fingerprint(other.params[part]) != params_fingerprint(
                pipeline.params[part]
            ):
                raise ValueError(
                    f"ensemble holds {path!r}, whose {part} has other weights than the model's: expected models that "
                    "differ in their UNet alone, since they share the encoded data set. Attribute it by itself."
                )
        unet, params = other.unet, other.params["unet"]
    else:
        unet, params = load_unet(path)
    if unet.config != pipeline.unet.config:
        raise ValueError(f"ensemble holds {path!r}, whose UNet has another config than the model's; expected the same")
    return params


def _store_kernel(file: Path, features: Any) -> None:
    if _read_kernel(file) is None:
        write_arrays(file, fit_kernel(features)._asdict(), {})


def _read_kernel(file: Path) -> Kernel | None:
    """The stored kernel; None where it has to be computed."""
    arrays = stored_arrays(file)
    return None if arrays is None else Kernel(**arrays)
