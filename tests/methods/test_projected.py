"""TRAK, Journey-TRAK, D-TRAK and DAS: whole methods against dense float64 references, and their stored features."""

import contextlib
import dataclasses
import functools
import types

import attrib_jax.jobs.projections as features_stage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attrib_jax.jobs.programs import ScorePrograms
from attrib_jax.jobs.projections import FeatureProgram, dataset_features

import attrib_jax.methods.projected as projected
from attrib_jax.attribution.projection import project
from attrib_jax.convert.load import load_pipeline
from attrib_jax.core.keys import example_noise, loss_key, purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods import method_config
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, init_params, make_data
from tests.failures import interrupt_writes, until_done
from tests.tiny_pipeline import make_torch_pipeline

COUNT, DIM = 7, 32
GRADIENTS = GradientSettings(projection_dim=DIM, journey_timestep=40, regularisation=0.3)
CONFIG = method_config(
    method="trak",
    weights="attn",
    query_draws=16,
    stride=25,
    captions="all",
    flips="max",
    loss_seed=5,
    gradients=GRADIENTS,
)


class TinyUNet:
    """The tiny denoiser behind the interface of a UNet module."""

    def apply(self, variables, latents, timesteps, text):
        timesteps = jnp.broadcast_to(timesteps, latents.shape[:1])
        return jax.vmap(tiny_denoiser.predict, (None, 0, 0, None))(variables["params"], latents, timesteps, text[0])


UNET = TinyUNet()
PIPELINE = types.SimpleNamespace(unet=UNET, schedule=SCHEDULE, params={"unet": init_params()})
# Compiled once for all tests.
PROGRAMS = ScorePrograms(PIPELINE)


def make_encoded():
    """Pictures with one or two captions, and row ids that are not their positions."""
    _, latents, text = make_data(COUNT, flips=2, captions=2)
    captions = np.arange(COUNT) % 2 + 1
    kept = np.concatenate([each[:count] for each, count in zip(text, captions)])
    return EncodedDataset(np.arange(COUNT) * 3 + 1, latents, kept, np.concatenate([[0], np.cumsum(captions)]))


def make_attributor(path, params=None):
    """What the methods take of an `Run`, around the tiny denoiser."""
    pipeline = PIPELINE if params is None else types.SimpleNamespace(params={"unet": params})
    return types.SimpleNamespace(
        pipeline=pipeline,
        inputs={"model": "tiny"},
        data=make_encoded(),
        root=StageRoot(path),
        programs=PROGRAMS,
        timed=lambda stage, reused=False: contextlib.nullcontext(),
    )


def make_query(seed=8):
    _, latents, text = make_data(1, seed=seed)
    return PreparedQuery(None, latents[0, 0], text[0, 0], ())


@pytest.fixture(scope="module")
def attributor(tmp_path_factory):
    return make_attributor(tmp_path_factory.mktemp("workdir"))


def run(attributor, config, regularisations=(0.3,), queries=None):
    return projected.scores_by_regularisation(attributor, queries or [make_query()], config, regularisations)


OUTPUTS = {
    "loss": lambda prediction, noise: jnp.mean((prediction - noise) ** 2),
    "square": lambda prediction, noise: jnp.mean(prediction**2),
    "mean": lambda prediction, noise: jnp.mean(prediction),
}


class Reference:
    """Dense float64 features: one gradient an example and timestep, times the projection written out."""

    def __init__(self, output, params, projection_seed=0):
        self.selected, self.rest = select_weights(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params), "attn")
        leaves = flatten_names(self.selected)
        self.output, self.names = output, sorted(leaves)
        sizes = {name: leaves[name].size for name in self.names}
        identity, first, total = {}, 0, sum(sizes.values())
        for name in self.names:
            identity[name] = np.zeros((total, sizes[name]))
            identity[name][first : first + sizes[name]] = np.eye(sizes[name])
            first += sizes[name]
        key = purpose_key(projection_seed, "projection")
        self.matrix = np.asarray(jax.jit(project, static_argnums=(2, 3))(identity, key, "sparse", DIM))

        @jax.jit
        def gradient(selected, rest, noisy, noise, timestep, text):
            def value(selected):
                prediction = tiny_denoiser.predict(merge_weights(selected, rest), noisy, timestep, text)
                return OUTPUTS[output](prediction, noise), jnp.sqrt(jnp.mean((prediction - noise) ** 2))

            return jax.grad(value, has_aux=True)(selected)

        self.gradient = gradient

    def __call__(self, latents, text, row_id, flip, caption, timesteps):
        noise = example_noise(loss_key(5), int(row_id), flip, caption, np.asarray(timesteps, np.int32), latents.shape)
        total, residuals = 0, []
        for each, timestep in zip(np.asarray(noise, np.float64), timesteps):
            alpha = float(SCHEDULE.alphas_cumprod[timestep])
            noisy = np.sqrt(alpha) * latents.astype(np.float64) + np.sqrt(1 - alpha) * each
            tree, residual = self.gradient(self.selected, self.rest, noisy, each, timestep, text.astype(np.float64))
            leaves = flatten_names(tree)
            vector = np.concatenate([np.asarray(leaves[name]).ravel() for name in self.names])
            total = total + (vector / np.linalg.norm(vector) if self.output == "mean" else vector)
            residuals.append(float(residual))
        return total / len(timesteps) @ self.matrix, np.mean(residuals)


def dense_values(output, params, journey=None, leverage=False, projection_seed=0):
    """(N, flips) scores of `make_query()` by numpy."""
    data, query = make_encoded(), make_query()
    with jax.enable_x64(True):
        reference = Reference(output, params, projection_seed)
        timesteps = [0, 25, 50, 75]
        phi, residual = np.zeros((COUNT, 2, DIM)), np.zeros((COUNT, 2))
        for row in range(COUNT):
            for flip in range(2):
                count = int(data.num_captions[row])
                for caption in range(count):
                    latents, text = (part[0] for part in data.inputs(row, flip, caption))
                    feature, error = reference(latents, text, data.row_ids[row], flip, caption, timesteps)
                    phi[row, flip] += feature / count
                    residual[row, flip] += error / count
        used = timesteps if journey is None else [journey]
        rounds = 16 // len(used)
        draws = [reference(query.latents, query.text, 2**31 - 1 - draw, 0, 0, used)[0] for draw in range(rounds)]
    rows = phi.reshape(-1, DIM)
    gram = rows.T @ rows
    inverse = np.linalg.inv(gram + 0.3 * np.trace(gram) / DIM * np.eye(DIM))
    values = (phi @ inverse) @ np.mean(draws, axis=0)
    if output == "mean":
        values *= residual
    if leverage:
        values /= 1 - np.einsum("nfi,ij,nfj->nf", phi, inverse, phi)
    return values


@pytest.mark.parametrize(
    ("method", "output", "leverage"),
    [("trak", "loss", 0), ("journey-trak", "loss", 0), ("d-trak", "square", 0), ("das", "mean", 0), ("das", "mean", 1)],
)
def test_scores_equal_the_dense_reference(attributor, method, output, leverage):
    gradients = dataclasses.replace(GRADIENTS, das_leverage=bool(leverage))
    config = dataclasses.replace(CONFIG, method=method, gradients=gradients)
    ((scores,),) = run(attributor, config)
    journey = 40 if method == "journey-trak" else None
    expected = dense_values(output, attributor.pipeline.params["unet"], journey, bool(leverage))
    np.testing.assert_allclose(scores.score, expected.max(axis=1), rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(scores.flip, expected.argmax(axis=1))
    np.testing.assert_array_equal(scores.row_id, np.arange(COUNT) * 3 + 1)
    assert scores.loss_before is None and scores.loss_after is None


def test_models_of_an_ensemble_are_averaged_each_with_its_own_projection(attributor, monkeypatch):
    other = init_params(seed=1)
    seeds = {0: attributor.pipeline.params["unet"], 77: other}
    members = [projected.Member(params, {"model": str(seed)}, seed, f"-model-{seed}") for seed, params in seeds.items()]
    monkeypatch.setattr(projected, "_members", lambda *_: members)
    config = dataclasses.replace(CONFIG, flips="mean")
    ((scores,),) = run(attributor, config)
    expected = np.mean([dense_values("loss", params, projection_seed=seed) for seed, params in seeds.items()], axis=0)
    np.testing.assert_allclose(scores.score, expected.mean(axis=1), rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    assert scores.flip is None


def test_features_are_shared_by_queries_methods_and_regularisations(tmp_path, monkeypatch):
    attributor = make_attributor(tmp_path)
    written, write = [], ChunkStore.write
    monkeypatch.setattr(ChunkStore, "write", lambda self, *args: (written.append(self.path), write(self, *args)))
    (first, second), (strong, _) = run(attributor, CONFIG, (0.3, 5.0), [make_query(), make_query(9)])
    assert len(written) == 1
    assert not np.allclose(first.score, second.score, rtol=0.1)
    ((alone,),) = run(attributor, CONFIG, (5.0,))
    np.testing.assert_array_equal(alone.score, strong.score)
    run(attributor, dataclasses.replace(CONFIG, method="journey-trak"))
    assert len(written) == 1
    run(attributor, dataclasses.replace(CONFIG, method="d-trak"))
    assert len(written) == 2


@functools.cache
def make_program(devices=4, **options):
    settings = dict(output="mean", projection="sparse", projection_dim=DIM, num_weights=192, loss_seed=5, stride=25)
    return FeatureProgram(UNET, SCHEDULE, **settings | options, mesh=data_mesh(jax.devices()[:devices]))


def weights_of(seed=0):
    return *select_weights(init_params(), "cross-attn-kv"), purpose_key(seed, "projection")


def read_features(path, program):
    features, residuals = dataset_features(path, program, weights_of(), make_encoded(), 2, "all", "features")
    return np.asarray(features), residuals


def test_features_resume_to_the_same_bits_on_any_number_of_devices(tmp_path, monkeypatch):
    whole, residuals = read_features(tmp_path / "whole", make_program())
    assert whole.shape == (COUNT, 2, DIM) and whole.dtype == np.float32 and residuals.shape == (COUNT, 2)
    monkeypatch.setattr(features_stage, "_MAX_ROWS_PER_CHUNK", 2)
    with monkeypatch.context() as patch:
        interrupt_writes(patch, every=2)
        program = make_program(devices=3)
        (resumed, again), interruptions = until_done(lambda: read_features(tmp_path / "resumed", program))
    assert interruptions >= 2
    np.testing.assert_array_equal(resumed, whole)
    np.testing.assert_array_equal(again, residuals)
    chunk = next((tmp_path / "resumed").rglob("chunk-000001*"))
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"damaged!!")
    np.testing.assert_array_equal(read_features(tmp_path / "resumed", program)[0], whole)


def test_scores_in_another_precision(tmp_path, attributor):
    ((exact,),) = run(attributor, CONFIG)
    ((rounded,),) = run(make_attributor(tmp_path), dataclasses.replace(CONFIG, precision="bfloat16"))
    assert not np.array_equal(rounded.score, exact.score)
    assert np.corrcoef(rounded.score, exact.score)[0, 1] > 0.95


def test_tiles_change_rounding_only(tmp_path, monkeypatch):
    ours, _ = read_features(tmp_path / "ours", make_program())
    monkeypatch.setattr(features_stage, "_FORWARDS_PER_CPU", 12)
    program = make_program(projection_dim=DIM)
    assert program.tile == 3
    others, _ = read_features(tmp_path / "others", program)
    np.testing.assert_allclose(others, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


def test_a_damaged_kernel_is_computed_again_and_nan_weights_are_refused(tmp_path):
    attributor = make_attributor(tmp_path / "good")
    ((first,),) = run(attributor, CONFIG)
    file = next((tmp_path / "good").rglob("kernel.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    ((again,),) = run(attributor, CONFIG)
    np.testing.assert_array_equal(again.score, first.score)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, init_params())
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(make_attributor(tmp_path / "bad", nan), CONFIG)


def test_features_of_another_model_are_refused(tmp_path):
    attributor = make_attributor(tmp_path)
    run(attributor, CONFIG)
    attributor.inputs = {"model": "another"}
    with pytest.raises(StageMismatchError, match="model: stored"):
        run(attributor, CONFIG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pipelines that differ in everything, and one with the first's parts but for the UNet."""
    path = tmp_path_factory.mktemp("ensemble")
    for seed, name in enumerate(("first", "second")):
        make_torch_pipeline(str(path / name), seed=seed, unet_channels=(16,))
    return path


def test_models_of_an_ensemble_share_all_but_the_unet(folders):
    pipeline = load_pipeline(str(folders / "first"))
    stub = types.SimpleNamespace(pipeline=pipeline, inputs={"model": "own", "dataset": "d"})
    gradients = GradientSettings(ensemble=(str(folders / "second" / "unet"), str(folders / "first")))
    config = method_config(method="trak", gradients=gradients)
    own, second, same = projected._members(stub, config)
    assert own.inputs == stub.inputs and own.projection_seed == 0 and own.suffix == ""
    assert second.inputs["model"] != same.inputs["model"] and second.inputs["dataset"] == "d"
    assert len({own.projection_seed, second.projection_seed, same.projection_seed}) == 3
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), second.params, pipeline.params["unet"])
    assert min(jax.tree.leaves(differences)) > 0
    with pytest.raises(ValueError, match="vae has other weights than the model's"):
        projected._members(
            stub, dataclasses.replace(config, gradients=GradientSettings(ensemble=(str(folders / "second"),)))
        )
    # Its order and names do not matter, its content does.
    turned = GradientSettings(ensemble=gradients.ensemble[::-1])
    assert turned.settings("trak") == gradients.settings("trak")
    assert len(set(gradients.settings("trak")["ensemble"])) == 2


def test_settings_hold_what_the_method_uses():
    ours = {"projection": "sparse", "projection_dim": 2048, "projection_seed": 0, "regularisation": 0.1}
    settings = {method: method_config(method=method, steps=7).settings() for method in PROJECTED_METHODS}
    assert settings["trak"] == {
        "method": "trak",
        "weights": "cross-attn-kv",
        "query_draws": 2048,
        "stride": 100,
        "captions": "first",
        "flips": "max",
        "loss_seed": 0,
        "gradients": ours,
    }
    assert settings["journey-trak"]["gradients"] == {**ours, "journey_timestep": 400}
    assert settings["das"]["gradients"] == {**ours, "das_leverage": False}
    assert method_config(method="trak", precision="bfloat16").settings()["precision"] == "bfloat16"
    assert "gradients" not in method_config().settings()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientSettings(projection_dim=-4), "projection_dim is -4"),
        (lambda: GradientSettings(projection_dim=10), "multiple of 4"),
        (lambda: GradientSettings(projection="dense"), "unknown projection 'dense'"),
        (lambda: GradientSettings(regularisation=0), "regularisation is 0"),
        (lambda: GradientSettings(journey_timestep=-1), "journey_timestep is -1"),
        (lambda: GradientSettings(projection_seed=2**32), "projection_seed"),
        (lambda: GradientSettings(ensemble="model"), "expected a tuple of folders"),
        (lambda: GradientSettings(ensemble=("a", "a")), "more than once"),
        (
            lambda: method_config(method="trak", region=(0, 0, 8, 8)),
            "region is .* belongs to methods 'unlearn' and 'influence'",
        ),
        (lambda: method_config(method="das", region_mask="mask.png"), "region_mask is 'mask.png', but method='das'"),
        (
            lambda: method_config(method="pixel", region_mask="mask.png"),
            "region_mask is 'mask.png', but method='pixel'",
        ),
        (lambda: method_config(method="random", region=(0, 0, 8, 8)), "region is .*method='random' has no use"),
        (lambda: method_config(method="das", cascade=0.5), "cascade is 0.5"),
        (lambda: method_config(method="d-trak", score="linear"), "score is 'linear'"),
        (lambda: method_config(method="d-trak", fisher="file"), "fisher is 'file'"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_model_is_named(tmp_path):
    gradients = GradientSettings(ensemble=(str(tmp_path / "nowhere"),))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        method_config(method="trak", gradients=gradients).settings()
