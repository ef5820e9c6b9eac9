"""TRAK, Journey-TRAK, D-TRAK and DAS: kernels of projected gradients, METHOD.md sections 7 and 10.

Each scores tau(z_hat, z_i) = phi(z_hat)^T (Phi^T Phi + lambda I)^-1 phi(z_i), with phi the projected gradient of an
output of the model by the selected weights, averaged over timesteps:

- `trak` (Park et al. 2023, "TRAK: Attributing Model Behavior at Scale"): of the training loss.
- `journey-trak` (Georgiev et al. 2023, "The Journey, Not the Destination"): as TRAK, the query's loss at one timestep.
- `d-trak` (Zheng et al. 2024, "Intriguing Properties of Data Attribution on Diffusion Models"): of the mean square of
  the prediction, with no factor for the loss's derivative.
- `das` (Lin et al. 2024, "Diffusion Attribution Score"): of the prediction's mean, gradients brought to length 1 at
  each timestep; tau is multiplied by the training example's residual r_i and, on demand, divided by 1 - h_i.

Phi has a row for each picture and mirror image that is scored. Training features are a stage that all queries share,
and all methods with one output. A query's features are averaged over `query_draws` draws of (timestep, noise), in whole
rounds over the timesteps. Scores of several models are averaged.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attrib_jax.attribution.kernel import Kernel, fit_kernel, kernel_scores, leverages
from attrib_jax.attribution.scores import combine_flips
from attrib_jax.convert.load import load_pipeline, load_unet
from attrib_jax.core.fingerprint import params_fingerprint
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import select_weights
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.identity import model_fingerprint
from attrib_jax.jobs.projections import dataset_features
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.gradient_settings import unet_folder
from attrib_jax.methods.registry import Job, Scored
from attrib_jax.models.precision import cast_params
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import stored_arrays, write_arrays

if TYPE_CHECKING:
    from attrib_jax.attribute import Attributor

_KERNEL_FILE = "kernel.safetensors"
# Row ids of a query's rounds count down from here, so that they share no noise with training pictures.
_LAST_ROW_ID = 2**31 - 1


class Member(NamedTuple):
    """A model whose scores are averaged: its weights, what its features are made from, and its projection's seed."""

    params: Any
    inputs: Mapping[str, str]
    projection_seed: int
    suffix: str


def projected_scores(attributor: "Attributor", jobs: Sequence[Job], config: AttributeConfig) -> list[Scored]:
    """The scores of every job by a projected method, see the module."""
    queries = [job.prepared for job in jobs]
    (scores,) = scores_by_regularisation(attributor, queries, config, [config.gradients.regularisation])
    return [(each, ()) for each in scores]


def scores_by_regularisation(
    attributor: "Attributor",
    queries: Sequence[PreparedQuery],
    config: AttributeConfig,
    regularisations: Sequence[float],
) -> list[list[Scores]]:
    """Scores for each regularisation, in place of that of `config`, and each query.

    All come from the same features and one eigendecomposition a model, so that the regularisation can be chosen on
    held-out queries at the cost of one.
    """
    members = _members(attributor, config)
    values = sum(_member_values(attributor, member, queries, config, regularisations) for member in members)
    row_ids = attributor.data.row_ids
    return [[_scores(row_ids, each / len(members), config) for each in at_one] for at_one in values]


def _scores(row_ids: np.ndarray, values: np.ndarray, config: AttributeConfig) -> Scores:
    score, flip = combine_flips(values, config.flips)
    return Scores(row_ids, score, flip=None if config.flips == "mean" else flip)


def _member_values(attributor, member: Member, queries, config: AttributeConfig, regularisations) -> np.ndarray:
    """(len(regularisations), Q, N, flips) float64 of one model."""
    selected, _ = select_weights(member.params, config.weights)
    _, rest = select_weights(cast_params(member.params, config.precision), config.weights)
    weights = selected, rest, purpose_key(member.projection_seed, "projection")
    stage = _stage(config, member)
    reused, data = attributor.root.is_finished(*stage), attributor.data
    with attributor.timed("features", reused), attributor.root.stage(*stage) as opened:
        program = attributor.programs.features(config)
        arguments = weights, data, config.num_flips, config.captions, "projected gradients"
        features, residuals = dataset_features(opened.path, program, *arguments)
        run_on_host0(functools.partial(_store_kernel, opened.path / _KERNEL_FILE, features))
    with attributor.timed("query gradients"):
        journey = config.gradients.journey_timestep if config.method == "journey-trak" else None
        program = attributor.programs.features(config, journey)
        query_features = _query_features(program, weights, queries, config)
    with attributor.timed("kernel"):

        def score() -> np.ndarray:
            kernel = _read_kernel(opened.path / _KERNEL_FILE)
            values = kernel_scores(features, query_features, regularisations, kernel)
            if residuals is not None:
                values *= residuals
            if config.method == "das" and config.gradients.das_leverage:
                for at_one, regularisation in zip(values, regularisations):
                    at_one /= 1 - leverages(features, kernel, regularisation)
            return values

        return run_on_host0(score)


def _query_features(program, weights, queries: Sequence[PreparedQuery], config: AttributeConfig) -> np.ndarray:
    """(Q, k) float64: each query's gradient, averaged over its draws, projected."""
    rounds = -(-config.query_draws // program.num_timesteps)
    weights = program.place(weights)
    result = []
    with progress(len(queries) * rounds * program.num_timesteps, "query gradients", "draw") as bar:
        for query in queries:
            data = EncodedDataset(
                row_ids=np.arange(_LAST_ROW_ID, _LAST_ROW_ID - rounds, -1, np.int32),
                latents=query.latents[None, None],
                text=query.text[None],
                first_caption=np.array([0, 1]),
                positions=np.zeros(rounds, np.int64),
            )
            values = program(
                weights, data, np.arange(rounds), 1, "first", lambda count: bar.update(count * program.num_timesteps)
            )
            result.append(values.mean(axis=(0, 1))[: program.projection_dim])
    return np.stack(result)


def _stage(config: AttributeConfig, member: Member) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """Name, settings and inputs of the training features."""
    gradients = config.gradients
    output = gradients.output(config.method)
    settings = {name: getattr(config, name) for name in ("weights", "loss_seed", "stride", "captions", "num_flips")}
    settings |= {name: getattr(gradients, name) for name in ("projection", "projection_dim")}
    settings |= {"output": output, "projection_seed": member.projection_seed}
    name = (
        f"features/{output}-{config.weights}-{gradients.projection}{gradients.projection_dim}"
        f"-seed{gradients.projection_seed}-stride{config.stride}-{config.captions}-flips{config.num_flips}"
        f"-seed{config.loss_seed}"
    )
    if config.precision != "float32":
        name, settings = f"{name}-{config.precision}", {**settings, "precision": config.precision}
    return name + member.suffix, settings, member.inputs


def _members(attributor: "Attributor", config: AttributeConfig) -> list[Member]:
    """The model, and those of the ensemble, each with a projection of its own that does not depend on their order."""
    pipeline, seed = attributor.pipeline, config.gradients.projection_seed
    members = [Member(pipeline.params["unet"], attributor.inputs, seed, "")]
    for path in config.gradients.ensemble:
        params = _load_unet(path, pipeline)
        fingerprint = model_fingerprint(dataclasses.replace(pipeline, params=pipeline.params | {"unet": params}))
        own_seed = (seed + int(fingerprint[:8], 16)) % 2**32
        inputs = {**attributor.inputs, "model": fingerprint}
        members.append(Member(params, inputs, own_seed, f"-model-{fingerprint[:8]}"))
    return members


def _load_unet(path: str, pipeline) -> Any:
    """The UNet parameters of a model of the ensemble; ValueError where it does not share the encoded data set."""
    folder = unet_folder(path)
    if folder != Path(path):
        other = load_pipeline(path)
        for part in ("vae", "text_encoder"):
            if params_fingerprint(other.params[part]) != params_fingerprint(pipeline.params[part]):
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
