"""Encoding: what is stored, what is left out, and that resuming and workers change nothing."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert.adapters.textual_inversion import add_tokens
from attrib_jax.convert.pipeline import encode_text, tokenize
from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import EncodeConfig, encode, read_skipped
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.storage.files import DamagedFileError, StorageError
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import UnreadableImages
from tests.tiny_dataset import make_dataset

QUERY = Query(prompt="red heart", seed=3, sampler_steps=3)
CONFIG = method_config(query_draws=32, fisher_samples=64, stride=300, step_size=0.01)


def damaged_pictures(dataset, rows):
    return UnreadableImages(dataset, rows, lambda row: UnreadableRowError(f"picture {row}.png is cut off"))


def encoded(path, pipeline, dataset, config=EncodeConfig()):  # noqa: B008
    inputs = {"model": "m", "dataset": dataset.fingerprint(), "encoding": config.describe()}
    return encode(StageRoot(path), pipeline, inputs, dataset, config)


def scored(path, pipeline, dataset, config):
    return attribute_queries(Run(pipeline, dataset, StageRoot(path)), [QUERY], config)[0].scores


@pytest.fixture(scope="module")
def plain(pipeline, dataset, tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("plain"), pipeline, dataset)


def distribution(pipeline, images):
    values = images.astype(np.float32) / 127.5 - 1
    vae = pipeline.vae
    return jax.jit(lambda p, x: vae.apply({"params": p}, x, method=vae.encode))(pipeline.params["vae"], values)


def test_latents_and_text_states_are_the_models(plain, pipeline, dataset):
    rows = np.array([0, 20, 36])
    images = np.stack([dataset[row].image for row in rows])
    latents, text = plain.inputs(rows, 0, 0)
    scale = pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(latents, distribution(pipeline, images).mean * scale, atol=1e-5)
    mirrored, _ = plain.inputs(rows, 1, 0)
    np.testing.assert_allclose(mirrored, distribution(pipeline, images[:, :, ::-1]).mean * scale, atol=1e-5)
    ids = tokenize(pipeline, [dataset.captions(row)[0] for row in rows])
    expected = jax.jit(lambda p, x: encode_text(pipeline.text_encoder, p, x))(pipeline.params["text_encoder"], ids)
    np.testing.assert_allclose(text, expected, atol=1e-5)
    last = plain.num_captions[rows] - 1
    _, text = plain.inputs(rows, 0, last)
    ids = tokenize(pipeline, [dataset.captions(row)[-1] for row in rows])
    expected = jax.jit(lambda p, x: encode_text(pipeline.text_encoder, p, x))(pipeline.params["text_encoder"], ids)
    np.testing.assert_allclose(text, expected, atol=1e-5)


def test_half_precision_store_is_rounded_once(plain, pipeline, dataset, tmp_path):
    half = encoded(tmp_path, pipeline, dataset, EncodeConfig(dtype="float16"))
    assert half.latents.dtype == half.text.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(half.latents), np.asarray(plain.latents).astype(np.float16))
    latents, text = half.inputs(np.arange(3), 0, 0)
    assert latents.dtype == text.dtype == np.float32


def test_sampled_latents_follow_the_distribution_and_depend_on_the_row_alone(pipeline, dataset, tmp_path):
    config = EncodeConfig(posterior="sample", seed=5)
    sampled = encoded(tmp_path / "a", pipeline, dataset, config)
    images = np.stack([dataset[row].image for row in range(len(dataset))])
    mean, logvar = distribution(pipeline, images)
    latents, _ = sampled.inputs(np.arange(len(dataset)), 0, 0)
    noise = (latents / pipeline.vae.config.scaling_factor - mean) / np.exp(0.5 * logvar)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    mirrored, _ = sampled.inputs(np.arange(len(dataset)), 1, 0)
    assert np.abs(latents - mirrored[:, :, ::-1]).max() > 0.01
    order = np.random.default_rng(0).permutation(len(dataset))
    shuffled = type(dataset)(
        images[order], [dataset.captions(row) for row in order], row_ids=np.asarray(dataset.row_ids)[order]
    )
    again = encoded(tmp_path / "b", pipeline, shuffled, config)
    np.testing.assert_allclose(again.inputs(np.arange(len(dataset)), 0, 0)[0], latents[order], atol=1e-6)
    other = encoded(tmp_path / "c", pipeline, dataset, EncodeConfig(posterior="sample", seed=6))
    assert np.abs(other.inputs(0, 0, 0)[0] - latents[0]).max() > 1e-4


def test_worker_processes_change_nothing(plain, pipeline, dataset, tmp_path):
    workers = encoded(tmp_path, pipeline, dataset, EncodeConfig(workers=2))
    np.testing.assert_array_equal(np.asarray(workers.latents), np.asarray(plain.latents))


def test_unreadable_pictures_are_left_out_counted_and_listed(plain, pipeline, dataset, tmp_path, caplog):
    damaged = encoded(tmp_path, pipeline, damaged_pictures(dataset, {0, 17}))
    kept = np.delete(np.arange(len(dataset)), [0, 17])
    np.testing.assert_array_equal(damaged.row_ids, np.asarray(dataset.row_ids)[kept])
    assert "2 of 37 images" in caplog.text and "picture 17.png is cut off" in caplog.text
    assert read_skipped(tmp_path / "latents") == {0: "picture 0.png is cut off", 17: "picture 17.png is cut off"}
    np.testing.assert_array_equal(damaged.num_captions, plain.num_captions[kept])
    for field in (0, 1):
        ours, theirs = damaged.inputs(np.arange(35), 1, 0)[field], plain.inputs(kept, 1, 0)[field]
        np.testing.assert_array_equal(ours, theirs)


def test_scores_of_the_readable_pictures_do_not_depend_on_the_others(pipeline, dataset, tmp_path):
    config = method_config(query_draws=32, update="sgd", stride=300)
    whole = scored(tmp_path / "a", pipeline, dataset, config)
    damaged = scored(tmp_path / "b", pipeline, damaged_pictures(dataset, {3}), config)
    kept = np.delete(np.arange(len(dataset)), 3)
    np.testing.assert_array_equal(damaged.row_id, whole.row_id[kept])
    np.testing.assert_array_equal(damaged.score, whole.score[kept])


def test_captions_are_read_again_only_where_they_have_to_be_encoded(plain, pipeline, dataset, tmp_path, monkeypatch):
    first = encoded(tmp_path, pipeline, dataset)
    calls, captions = [], type(dataset).captions
    monkeypatch.setattr(type(dataset), "captions", lambda self, index: calls.append(index) or captions(self, index))
    again = encoded(tmp_path, pipeline, dataset)
    np.testing.assert_array_equal(again.first_caption, first.first_caption)
    assert not calls
    (file,) = (tmp_path / "text" / "text").glob("chunk-*")
    file.unlink()
    np.testing.assert_array_equal(np.asarray(encoded(tmp_path, pipeline, dataset).text), np.asarray(plain.text))
    assert calls
    (tmp_path / "text" / "rows.safetensors").write_bytes(b"damaged")
    np.testing.assert_array_equal(encoded(tmp_path, pipeline, dataset).first_caption, first.first_caption)


def test_a_data_set_without_a_readable_picture(pipeline, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"no image that can be read \(the first: picture 0.png is cut off\)"):
        encoded(tmp_path, pipeline, damaged_pictures(dataset, set(range(len(dataset)))))


def test_a_deleted_chunk_is_encoded_again_to_the_same_bits(pipeline, dataset, tmp_path):
    first = np.asarray(encoded(tmp_path, pipeline, damaged_pictures(dataset, {2})).latents)
    (file,) = (tmp_path / "latents" / "latents").glob("chunk-*")
    file.unlink()
    # The picture has been mended meanwhile.
    again = encoded(tmp_path, pipeline, dataset)
    assert again.skipped == {} and len(again) == len(dataset)
    kept = np.delete(np.arange(len(dataset)), 2)
    np.testing.assert_array_equal(np.asarray(again.latents)[kept], first[kept])
    assert read_skipped(tmp_path / "latents") == {}


def test_wrong_size_is_refused(pipeline, tmp_path):
    images = np.zeros((3, 24, 16, 3), np.uint8)
    dataset = type(make_dataset())(images, [["a"]] * 3)
    with pytest.raises(ValueError, match=r"\(24, 16\) pixels .* at position 0; the model was trained on \(16, 16\)"):
        encoded(tmp_path, pipeline, dataset)


def save_latents(path, data, count):
    latents = np.asarray(data.latents)[:count].transpose(1, 0, 4, 2, 3)
    np.save(f"{path}_latents.npy", latents.reshape(2 * count, *latents.shape[2:]))
    text = np.stack([data.inputs(row, 0, 0)[1] for row in range(count)])
    np.save(f"{path}_text_embeddings.npy", text)


def test_stored_latents_are_attributed_as_their_pictures_are(plain, pipeline, dataset, tmp_path):
    save_latents(tmp_path / "x", plain, len(dataset))
    config = method_config(query_draws=32, update="sgd", stride=300)
    images = np.stack([dataset[row].image for row in range(len(dataset))])
    single = type(dataset)(images, [dataset.captions(row)[:1] for row in range(len(dataset))])
    expected = scored(tmp_path / "a", pipeline, single, config)
    stored = scored(tmp_path / "b", pipeline, open_latents(tmp_path / "x"), config)
    np.testing.assert_array_equal(stored.score, expected.score)
    unscaled = np.load(tmp_path / "x_latents.npy") / pipeline.vae.config.scaling_factor
    np.save(tmp_path / "x_latents.npy", unscaled)
    scores = scored(tmp_path / "c", pipeline, open_latents(tmp_path / "x", scaled=False), config)
    np.testing.assert_allclose(scores.loss_before, expected.loss_before, rtol=1e-5)


def test_exemplars_before_stored_latents(plain, pipeline, dataset, tmp_path):
    save_latents(tmp_path / "x", plain, 9)
    exemplars = make_dataset(4, seed=1)
    joined = concatenate(exemplars, open_latents(tmp_path / "x"))
    data = encoded(tmp_path / "joined", pipeline, joined)
    assert len(data) == 13 and np.array_equal(data.row_ids, joined.row_ids)
    alone = encoded(tmp_path / "alone", pipeline, exemplars)
    for rows, part, inner in ((np.arange(4), alone, np.arange(4)), (np.arange(4, 13), plain, np.arange(9))):
        for flip in (0, 1):
            for ours, theirs in zip(data.inputs(rows, flip, 0), part.inputs(inner, flip, 0)):
                np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert data.num_captions.tolist() == [*alone.num_captions, *[1] * 9]


def test_exemplars_before_a_workdir_that_left_pictures_out(plain, pipeline, dataset, tmp_path):
    encoded(tmp_path / "first", pipeline, damaged_pictures(dataset, {3, 17}))
    joined = concatenate(make_dataset(4, seed=1), open_latents(tmp_path / "first"))
    data = encoded(tmp_path / "joined", pipeline, joined)
    np.testing.assert_array_equal(data.row_ids, joined.row_ids)
    kept = np.delete(np.arange(len(dataset)), [3, 17])
    for ours, theirs in zip(data.inputs(np.arange(4, len(data)), 1, 0), plain.inputs(kept, 1, 0)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_latents_of_another_model_are_refused(plain, pipeline, tmp_path):
    save_latents(tmp_path / "x", plain, 5)
    text = np.load(tmp_path / "x_text_embeddings.npy")
    np.save(tmp_path / "x_text_embeddings.npy", text[..., :-1])
    with pytest.raises(ValueError, match="text states of width 31; the model reads 32"):
        encoded(tmp_path / "w", pipeline, open_latents(tmp_path / "x"))
    np.save(tmp_path / "x_latents.npy", np.load(tmp_path / "x_latents.npy")[:, :, :4])
    with pytest.raises(ValueError, match=r"\(4, 8, 4\); the model was trained on \(8, 8, 4\)"):
        encoded(tmp_path / "w", pipeline, open_latents(tmp_path / "x"))


def test_an_encoded_workdir_is_a_data_set(pipeline, dataset, tmp_path):
    damaged = damaged_pictures(dataset, {5})
    stored = encoded(tmp_path / "a", pipeline, damaged)
    reopened = open_latents(tmp_path / "a", images=dataset)
    again = encoded(tmp_path / "b", pipeline, reopened)
    assert not (tmp_path / "b").exists()
    np.testing.assert_array_equal(again.row_ids, stored.row_ids)
    np.testing.assert_array_equal(again.num_captions, stored.num_captions)
    rows = np.array([3, 4, 5, 35])
    for ours, theirs in zip(again.inputs(rows, 1, 0), stored.inputs(rows, 1, 0)):
        np.testing.assert_array_equal(ours, theirs)
    assert reopened.captions(5) == dataset.captions(6) and reopened[5].row_id == dataset.row_ids[6]
    assert reopened.fingerprint() == open_latents(tmp_path / "a").fingerprint()
    with pytest.raises(ValueError, match="has 9 images; expected the 37 stored ones"):
        open_latents(tmp_path / "a", images=make_dataset(9))


def test_an_encoded_workdir_serves_models_with_the_same_encoders_only(pipeline, dataset, tmp_path):
    encoded(tmp_path / "a", pipeline, dataset)
    customised = add_tokens(pipeline, {"<new1>": np.ones(32, np.float32)})
    encoded(tmp_path / "b", customised, open_latents(tmp_path / "a"))
    vae = jax.tree.map(lambda leaf: leaf * 1.001, pipeline.params["vae"])
    other = dataclasses.replace(pipeline, params=pipeline.params | {"vae": vae})
    with pytest.raises(ValueError, match="was encoded by another model: its vae differ"):
        encoded(tmp_path / "b", other, open_latents(tmp_path / "a"))
    with pytest.raises(ValueError, match="was encoded by another model: its tokenizer differ"):
        encoded(tmp_path / "b", padded_otherwise(pipeline), open_latents(tmp_path / "a"))
    # A workdir of before the tokenizer was noted.
    stored = open_latents(tmp_path / "a")
    del stored.encoders["tokenizer"]
    encoded(tmp_path / "c", pipeline, stored)


def padded_otherwise(pipeline):
    """The same model, whose tokenizer fills up with another token, as that of Stable Diffusion 2 does."""
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.pad_token = "!"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    return dataclasses.replace(pipeline, tokenizer=tokenizer)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_list_of_unreadable_pictures_is_named(pipeline, dataset, tmp_path, damage):
    encoded(tmp_path, pipeline, damaged_pictures(dataset, {4}))
    file = tmp_path / "latents" / "skipped.json"
    content = file.read_bytes()
    file.write_bytes(content[:-9] if damage == "truncated" else content.replace(b'"4"', b'"5"'))
    with pytest.raises(DamagedFileError, match=r"skipped.json is damaged .*Delete the folder .*latents"):
        read_skipped(tmp_path / "latents")


def test_a_list_of_unreadable_pictures_without_a_checksum_is_read(tmp_path):
    (tmp_path / "skipped.json").write_text('{"4": "cut off"}')
    assert read_skipped(tmp_path) == {4: "cut off"}


def test_an_unfinished_workdir_is_no_data_set(pipeline, dataset, tmp_path):
    encoded(tmp_path, pipeline, dataset)
    record = tmp_path / "latents" / "stage.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(StorageError, match="is not finished"):
        open_latents(tmp_path)
