"""TRAK, Journey-TRAK, D-TRAK and DAS: whole methods against dense float64 references, and their stored features."""

import contextlib
import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.projection import project
from attrib_jax.core.keys import example_noise, loss_key, purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.query import PreparedQuery, Query
from attrib_jax.methods import method_config
from attrib_jax.methods.projected import OUTPUTS as OUTPUT_NAMES
from attrib_jax.methods.projected import ProjectedConfig, dataset_features, feature_program, scores_by_regularisation
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, init_params, make_data
from tests.failures import interrupt_writes, until_done
from tests.tiny_pipeline import make_torch_pipeline

COUNT, DIM = 7, 32
CONFIG = ProjectedConfig(
    method="trak",
    weights="attn",
    query_draws=16,
    stride=25,
    captions="all",
    flips="max",
    loss_seed=5,
    projection_dim=DIM,
    regularisation=0.3,
)
JOURNEY = dataclasses.replace(CONFIG, method="journey-trak", journey_timestep=40)


class TinyUNet:
    """The tiny denoiser behind the interface of a UNet module."""

    def apply(self, variables, latents, timesteps, text):
        timesteps = jnp.broadcast_to(timesteps, latents.shape[:1])
        return jax.vmap(tiny_denoiser.predict, (None, 0, 0, None))(variables["params"], latents, timesteps, text[0])


UNET = TinyUNet()
PIPELINE = types.SimpleNamespace(unet=UNET, schedule=SCHEDULE, params={"unet": init_params()})


def make_encoded():
    """Pictures with one or two captions, and row ids that are not their positions."""
    _, latents, text = make_data(COUNT, flips=2, captions=2)
    captions = np.arange(COUNT) % 2 + 1
    kept = np.concatenate([each[:count] for each, count in zip(text, captions)])
    return EncodedDataset(np.arange(COUNT) * 3 + 1, latents, kept, np.concatenate([[0], np.cumsum(captions)]))


def make_run(path, params=None, data=None):
    """What the methods take of a `Run`, around the tiny denoiser."""
    pipeline = types.SimpleNamespace(**{**vars(PIPELINE), "params": {"unet": params or init_params()}})
    return types.SimpleNamespace(
        pipeline=pipeline,
        inputs={"model": "tiny"},
        data=data or make_encoded(),
        root=StageRoot(path),
        select=lambda weights: select_weights(pipeline.params["unet"], weights),
        timed=lambda stage, reused=False: contextlib.nullcontext(),
    )


def make_query(seed=8):
    _, latents, text = make_data(1, seed=seed)
    return PreparedQuery(None, latents[0, 0], text[0, 0], ())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("workdir"))


def scored(run, config, regularisations=(0.3,), queries=None):
    return scores_by_regularisation(run, queries or [make_query()], config, regularisations)


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
    ("config", "output"),
    [
        (CONFIG, "loss"),
        (JOURNEY, "loss"),
        (dataclasses.replace(CONFIG, method="d-trak"), "square"),
        (dataclasses.replace(CONFIG, method="das"), "mean"),
        (dataclasses.replace(CONFIG, method="das", das_leverage=True), "mean"),
    ],
)
def test_scores_equal_the_dense_reference(run, config, output):
    ((scores,),) = scored(run, config)
    journey = 40 if config is JOURNEY else None
    expected = dense_values(output, run.pipeline.params["unet"], journey, config.das_leverage)
    np.testing.assert_allclose(scores.score, expected.max(axis=1), rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(scores.flip, expected.argmax(axis=1))
    np.testing.assert_array_equal(scores.row_id, np.arange(COUNT) * 3 + 1)
    assert scores.loss_before is None and scores.loss_after is None


def written(run):
    """The stored chunks of features, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in run.root.workdir.rglob("chunk-*")}


def test_features_are_shared_by_queries_methods_and_regularisations(tmp_path):
    run = make_run(tmp_path)
    (first, second), (strong, _) = scored(run, CONFIG, (0.3, 5.0), [make_query(), make_query(9)])
    stored = written(run)
    assert len(stored) == 1 and not np.allclose(first.score, second.score, rtol=0.1)
    ((alone,),) = scored(run, CONFIG, (5.0,))
    np.testing.assert_array_equal(alone.score, strong.score)
    scored(run, JOURNEY)
    assert written(run) == stored
    scored(run, dataclasses.replace(CONFIG, method="d-trak"))
    assert len(written(run)) == 2 and stored.items() <= written(run).items()


def test_features_resume_to_the_same_bits(tmp_path, monkeypatch):
    """More rows than a chunk holds."""
    _, latents, text = make_data(300, flips=2)
    data = EncodedDataset(np.arange(300), latents, text[:, 0], np.arange(301))
    run = make_run(tmp_path / "run", data=data)
    config = dataclasses.replace(CONFIG, method="das", stride=50, captions="first")
    program = feature_program(run, config)
    weights = *run.select(config.weights), purpose_key(0, "projection")

    def features(path):
        found, residuals = dataset_features(path, program, weights, data, "features")
        return np.asarray(found), residuals

    whole, residuals = features(tmp_path / "whole")
    assert whole.shape == (300, 2, DIM) and whole.dtype == np.float32 and residuals.shape == (300, 2)
    with monkeypatch.context() as patch:
        interrupt_writes(patch, every=2)
        (resumed, again), interruptions = until_done(lambda: features(tmp_path / "resumed"))
    assert interruptions == 1
    np.testing.assert_array_equal(resumed, whole)
    np.testing.assert_array_equal(again, residuals)
    chunk = next((tmp_path / "resumed").rglob("chunk-000001*"))
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"damaged!!")
    np.testing.assert_array_equal(features(tmp_path / "resumed")[0], whole)


def test_scores_in_another_precision(run):
    ((exact,),), ((rounded,),) = scored(run, CONFIG), scored(run, dataclasses.replace(CONFIG, precision="bfloat16"))
    assert not np.array_equal(rounded.score, exact.score)
    assert np.corrcoef(rounded.score, exact.score)[0, 1] > 0.95


def test_a_damaged_kernel_is_computed_again_and_nan_weights_are_refused(tmp_path):
    run = make_run(tmp_path / "good")
    ((first,),) = scored(run, CONFIG)
    file = next((tmp_path / "good").rglob("kernel.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    ((again,),) = scored(run, CONFIG)
    np.testing.assert_array_equal(again.score, first.score)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, init_params())
    with pytest.raises(ValueError, match="NaN or infinite"):
        scored(make_run(tmp_path / "bad", nan), CONFIG)


def test_features_of_another_model_are_refused(tmp_path):
    run = make_run(tmp_path)
    scored(run, CONFIG)
    run.inputs = {"model": "another"}
    with pytest.raises(StageMismatchError, match=r"inputs\.model: found .*, expected"):
        scored(run, CONFIG)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "share"), [("float16", 1e-3, 0.6), ("int8", 0.05, 0.4)], ids=["float16", "int8"]
)
def test_packed_features_take_fewer_bytes_and_give_nearly_the_same_scores(tmp_path, dtype, tolerance, share):
    _, latents, text = make_data(100, flips=2)
    data = EncodedDataset(np.arange(100), latents, text[:, 0], np.arange(101))
    run = make_run(tmp_path, data=data)
    config = dataclasses.replace(CONFIG, captions="first", projection_dim=128)
    packed = dataclasses.replace(config, features_dtype=dtype)
    ((exact,),), ((found,),) = scored(run, config), scored(run, packed)
    np.testing.assert_allclose(found.score, exact.score, atol=tolerance * exact.score.std())
    sizes = [
        next((tmp_path / "features").glob(f"*seed5{end}/features/chunk-*")).stat().st_size
        for end in ("", f"-stored-{dtype}")
    ]
    assert sizes[1] < share * sizes[0]
    # Each has a stage of its own.
    ((again,),) = scored(run, packed)
    np.testing.assert_array_equal(again.score, found.score)
    assert len(written(run)) == 2 and "features_dtype" not in config.describe()


def test_projections_of_other_kinds_give_scores_of_the_same_gradients(tmp_path):
    """Of a dimension at which a projection is near the gradient itself."""
    run = make_run(tmp_path)
    config = dataclasses.replace(CONFIG, captions="first", stride=50, query_draws=2, projection_dim=256)
    found = [
        scored(run, dataclasses.replace(config, projection=projection, **settings))[0][0].score
        for projection, settings in (
            ("sparse", {}),
            ("grouped", {}),
            ("factored", {}),
            ("factored", {"projection_side": 4}),
        )
    ]
    assert np.corrcoef(found[0], found[1])[0, 1] > 0.99
    # No side of the tiny denoiser is longer than the default.
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[2], found[3]) and np.corrcoef(found[2], found[3])[0, 1] > 0.5
    assert len(list((tmp_path / "features").iterdir())) == 4


# Ensembles, on the tiny pipeline.

QUERIES = [Query(prompt="red heart", seed=3, sampler_steps=2)]


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    """A pipeline with another UNet, one that differs in everything, and one with another architecture."""
    path = tmp_path_factory.mktemp("ensemble")
    for seed, name, channels in ((1, "other", (32,)), (2, "small", (16,))):
        make_torch_pipeline(str(path / name), seed=seed, unet_channels=channels)
    return path


def test_an_ensemble_is_the_mean_of_its_models_each_with_its_own_projection(pipeline, dataset, folders, tmp_path):
    unet = shutil.copytree(folders / "other" / "unet", tmp_path / "unet")
    run = Run(pipeline, dataset, StageRoot(tmp_path / "work"))
    config = ProjectedConfig(query_draws=4, stride=500, projection_dim=8, flips="mean")

    def attributed(**changes):
        return attribute_queries(run, QUERIES, dataclasses.replace(config, **changes))[0].scores

    for model, message in (("other", "vae has other weights"), ("small/unet", "another config")):
        with pytest.raises(ValueError, match=message):
            attributed(ensemble=(str(folders / model),))
    alone, both = attributed(), attributed(ensemble=(str(unet),))
    # What the other model adds is what it gives by itself, under the projection that is made from its weights.
    assert len({path.name for path in (run.root.workdir / "features").iterdir()}) == 2
    other = 2 * both.score - alone.score
    assert not np.allclose(other, alone.score, rtol=0.1)
    twice = attributed(ensemble=(str(unet), str(shutil.copytree(unet, tmp_path / "again"))))
    np.testing.assert_allclose(twice.score, (alone.score + 2 * other) / 3, rtol=1e-9, atol=1e-12)


def test_settings_hold_the_content_of_an_ensemble_in_any_order(folders):
    models = tuple(str(folders / name) for name in ("other", "small"))
    first, turned = (ProjectedConfig(ensemble=each).describe() for each in (models, models[::-1]))
    assert first == turned and len({*first["ensemble"]}) == 2
    assert ProjectedConfig(ensemble=models[:1]).describe() != first
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ProjectedConfig(ensemble=("nowhere",)).describe()


def test_settings_hold_what_the_method_uses():
    plain = {method: method_config(method).describe() for method in OUTPUT_NAMES}
    assert plain["journey-trak"].keys() - plain["trak"].keys() == {"journey_timestep"}
    assert plain["das"].keys() - plain["d-trak"].keys() == {"das_leverage"}
    assert plain["trak"].keys() == plain["d-trak"].keys() and "batch_size" not in plain["trak"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection_dim": -4}, "projection_dim is -4"),
        ({"projection_dim": 10}, "projection_dim is 10"),
        ({"projection": "dense"}, "unknown projection 'dense'"),
        ({"projection_side": 64}, "projection_side is 64.*projection is 'sparse'"),
        ({"projection": "factored", "projection_side": 0}, "projection_side is 0"),
        ({"features_dtype": "int4"}, "unknown features_dtype 'int4'"),
        ({"regularisation": 0}, "regularisation is 0"),
        ({"method": "journey-trak", "journey_timestep": -1}, "journey_timestep is -1"),
        ({"journey_timestep": 3}, "journey_timestep is 3.*method is 'trak'"),
        ({"das_leverage": True}, "das_leverage is True.*method is 'trak'"),
        ({"projection_seed": 2**32}, "projection_seed is"),
        ({"ensemble": "model"}, "ensemble is 'model'"),
        ({"ensemble": ("a", "a")}, "ensemble holds 'a'"),
        ({"method": "unlearn"}, "unknown method 'unlearn'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProjectedConfig(**settings)
