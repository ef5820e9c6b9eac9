"""Stable Diffusion XL through the stages and the methods: pooled text and size ids are stored, resumed and used."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.outputs import output_gradient, output_gradients
from attrib_jax.attribution.scores import dataset_losses
from attrib_jax.convert.pipeline import encode_text, tokenize
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights
from attrib_jax.curvature import ekfac, fisher
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import open_dataset
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs import draws
from attrib_jax.jobs.context import Run, model_fingerprint
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.encoded_dataset import join
from attrib_jax.jobs.query import Query, prepare_query, query_settings
from attrib_jax.methods.influence import InfluenceConfig
from attrib_jax.methods.residual import ResidualConfig
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.storage.stage_root import StageRoot
from tests.tiny_dataset import make_dataset

CONFIG = UnlearnConfig(query_draws=16, fisher_samples=32, stride=500, step_size=1e-5)
# Height and width of the images, and top and left of their crops to 16 pixels.
SIZES, CROPS = ((16, 16), (32, 16), (24, 40), (40, 20)), ((0, 0), (8, 0), (0, 5), (8, 0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("\n".join(["red heart", f"polar bear {number}"][: 1 + number % 2]))
    return open_dataset(f"folder:{folder}", resolution=16)


@pytest.fixture(scope="module")
def run(xl_pipeline, images, tmp_path_factory):
    return Run(xl_pipeline, images, StageRoot(tmp_path_factory.mktemp("xl")))


@pytest.fixture(scope="module")
def query(run):
    return prepare_query(run.pipeline, run.predict, Query("red heart", seed=3, sampler_steps=2))


def test_conditioning_is_stored_beside_text_and_latents(run, xl_pipeline, images):
    data = run.data
    _, found = data.inputs([1, 3, 3], [0, 1, 0], [0, 1, 0])
    ids = tokenize(xl_pipeline, ["red heart", "polar bear 3", "red heart"])
    expected = encode_text(xl_pipeline.conditioner, xl_pipeline.conditioner_params, ids)
    np.testing.assert_allclose(found["text"], expected["text"], atol=1e-5)
    np.testing.assert_allclose(found["pooled"], expected["pooled"], atol=1e-5)
    sizes = [[*size, *crop, 16, 16] for size, crop in zip(SIZES, CROPS)]
    assert np.asarray(data.by_image["ids"]).tolist() == sizes and found["ids"].tolist() == [
        sizes[1],
        sizes[3],
        sizes[3],
    ]

    # Read again, as a data set of latents, and twice in a row.
    stored = Run(xl_pipeline, open_latents(run.root.workdir, images), StageRoot(run.root.workdir / "again")).data
    for both in (stored, join(data, stored, np.arange(8, dtype=np.int32))):
        _, again = both.inputs(np.array([1, 3, 3]) + len(both) - 4, [0, 1, 0], [0, 1, 0])
        jax.tree.map(np.testing.assert_array_equal, again, found)


def test_latents_of_another_conditioning_are_refused(run, pipeline, xl_pipeline, tmp_path):
    other = Run(pipeline, make_dataset(3), StageRoot(tmp_path / "sd"))
    assert isinstance(other.data.inputs(0, 0, 0)[1], np.ndarray)
    for model, workdir, message in (
        (xl_pipeline, tmp_path / "sd", "text states"),
        (pipeline, run.root.workdir, "width 192; the model reads 32"),
    ):
        with pytest.raises(ValueError, match=message):
            _ = Run(model, open_latents(workdir), StageRoot(tmp_path / f"not {message[:4]}")).data


def test_what_decides_the_conditioning_is_in_the_fingerprint(xl_pipeline):
    params = xl_pipeline.params
    second = jax.tree.map(lambda leaf: leaf + 1, params["text_encoder_2"])
    changes = [{"params": params | {"text_encoder_2": second}}, {"zeros_for_empty_prompt": False}]
    changes += [{"tokenizer_2": xl_pipeline.tokenizer}]
    prints = [model_fingerprint(dataclasses.replace(xl_pipeline, **change)) for change in ({}, *changes)]
    assert len(set(prints)) == 4


def test_a_query_has_the_models_own_size_and_may_bring_its_text(run, query):
    assert query.text["ids"].tolist() == [16, 16, 0, 0, 16, 16]
    own = Query("", latents=query.latents, text={name: query.text[name] for name in ("text", "pooled")})
    jax.tree.map(np.testing.assert_array_equal, prepare_query(run.pipeline, run.predict, own).text, query.text)
    assert query_settings(own).keys() == {"prompt", "latents", "text.text", "text.pooled"}
    for text, message in (
        (query.text["text"], "an array; the model takes a dict of text and pooled"),
        ({"text": query.text["text"]}, r"a dict of \['text'\]"),
        (query.text | {"pooled": np.zeros(3)}, r"pooled have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_query(run.pipeline, run.predict, dataclasses.replace(own, text=text))


def test_scores_are_differences_of_losses_under_each_images_own_conditioning(run, query):
    queries = [Query("red heart", seed=3, sampler_steps=2)]
    exact = attribute_queries(run, queries, CONFIG)[0].scores
    rows = np.arange(4)
    inputs = run.data.inputs(np.repeat(rows, 2), np.tile([0, 1], 4), 0)
    latents, conditioning = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), inputs)
    first = jax.tree.map(lambda leaf: leaf[:, :1], conditioning)
    fixed = (loss_key(0), rows, latents, first, strided_timesteps(500, 1000))
    expected = dataset_losses(run.predict, run.pipeline.schedule, run.pipeline.params["unet"], *fixed)
    np.testing.assert_allclose(exact.loss_before, expected, rtol=1e-5)
    first["ids"] = np.broadcast_to(query.text["ids"], first["ids"].shape)
    other = dataset_losses(run.predict, run.pipeline.schedule, run.pipeline.params["unet"], *fixed)
    assert (np.abs(other / expected - 1)[1:] > 1e-4).all()  # the ids count

    # For a small step, the derivative along the weight change, and the influence function times the step over N.
    linear = attribute_queries(run, queries, dataclasses.replace(CONFIG, score="linear"))[0].scores.score
    shared = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(InfluenceConfig)}
    influence = attribute_queries(run, queries, InfluenceConfig(**shared | {"method": "influence"}))[0].scores.score
    np.testing.assert_allclose(linear, influence * CONFIG.step_size / len(rows), rtol=1e-3)


def test_the_residual_product_takes_the_text_states_of_both_encoders(run):
    config = ResidualConfig(stride=500, residual_start=0, text_kernel=("gaussian",))
    scores = attribute_queries(run, [Query("red heart", seed=3, sampler_steps=2)], config)[0].scores
    assert len(scores) == 4 and np.isfinite(scores.score).all() and scores.score.any()


@pytest.mark.parametrize("curvature", ["diagonal", "ekfac"])
def test_squares_in_factors_are_those_of_dense_gradients(run, monkeypatch, tmp_path, curvature):
    calls = []

    def fitted(folder):
        fresh = Run(run.pipeline, run.dataset, StageRoot(tmp_path / folder))
        fresh._data = run.data
        config = dataclasses.replace(CONFIG, curvature=curvature, fisher_samples=8)
        found = fit_curvature(fresh, config)
        return found if curvature == "diagonal" else found.eigenvalues

    whole = flatten_names(fitted("dense").tree)
    module = fisher if curvature == "diagonal" else ekfac
    product = module.TokenProduct
    monkeypatch.setattr(
        product, "add_squares", lambda *args, inner=product.add_squares: calls.append(1) or inner(*args)
    )
    monkeypatch.setattr(draws, "_GRADIENT_BYTES", 1)
    factored = flatten_names(fitted("factored").tree)
    assert calls
    for name, leaf in whole.items():
        np.testing.assert_allclose(factored[name], leaf, rtol=1e-4, atol=1e-6 * np.abs(leaf).max(), err_msg=name)


def test_projected_methods_take_each_examples_gradient(run):
    rows = np.array([0, 2])
    latents, conditioning = run.data.inputs(rows, 0, 0)
    batch = Batch(latents, conditioning, rows.astype(np.int32), *np.zeros((2, 2), np.int32), np.ones(2))
    selected, rest = run.select("cross-attn-kv")
    timesteps = strided_timesteps(500, 1000)
    model = "mean", run.predict, run.pipeline.schedule, lambda weights: merge_weights(weights, rest), selected

    @jax.jit
    def both():
        one = jax.vmap(lambda example: output_gradient(*model, loss_key(0), example, timesteps))
        return output_gradients(*model, rest, loss_key(0), batch, timesteps), one(batch)

    for found, expected in zip(*map(jax.tree.leaves, both()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
