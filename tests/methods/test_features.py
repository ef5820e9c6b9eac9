"""The similarity methods through `Run`: their scores against plain numpy, resume, and bad input."""

import shutil

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.features import image_features, text_features
from attrib_jax.convert.tower import load_tower
from attrib_jax.core.types import Scores
from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run, check_images
from attrib_jax.jobs.encode import encode
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.methods.features import default_tower
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.failures import UnreadableImages, interrupt_writes
from tests.tiny_dataset import make_dataset
from tests.towers import save_torch_tower


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    for family in ("clip", "dino", "dinov2"):
        save_torch_tower(family, folder / family)
    return folder


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


QUERIES = [Query("red heart 0", image=image(1)), Query("hat", image=image(2)), Query("keycap 10", image=image(1))]


def scored(workdir, pipeline, dataset, method, queries=QUERIES, **settings) -> list[Scores]:
    run = Run(pipeline, dataset, StageRoot(workdir))
    return [result.scores for result in attribute_queries(run, queries, method_config(method, **settings))]


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = (x.reshape(len(x), -1).astype(np.float64) for x in (left, right))
    return (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)


def images_of(dataset) -> np.ndarray:
    return np.stack([dataset[i].image for i in range(len(dataset))]).astype(np.float32) / 127.5 - 1


@pytest.mark.parametrize("flips", ["max", "mean", "none"])
def test_pixel_is_the_cosine_of_flattened_pixels(tmp_path, pipeline, dataset, flips):
    own = images_of(dataset)
    queries = np.stack([query.image for query in QUERIES]).astype(np.float32) / 127.5 - 1
    both = np.stack([cosine(own, queries), cosine(own[:, :, ::-1], queries)])
    expected = {"max": both.max(0), "mean": both.mean(0), "none": both[0]}[flips]
    results = scored(tmp_path, pipeline, dataset, "pixel", flips=flips)
    for scores, column in zip(results, expected.T):
        np.testing.assert_array_equal(scores.row_id, dataset.row_ids)
        np.testing.assert_allclose(scores.score, column, atol=1e-6)
    if flips == "max":
        np.testing.assert_array_equal(results[0].flip, both.argmax(0)[:, 0])


def test_pixel_finds_a_training_picture_and_its_mirror_image(tmp_path, pipeline, dataset):
    queries = [Query("", image=dataset[5].image), Query("", image=dataset[7].image[:, ::-1].copy())]
    first, second = scored(tmp_path, pipeline, dataset, "pixel", queries=queries)
    assert first.rank_of(dataset.row_ids[5]) == second.rank_of(dataset.row_ids[7]) == 1
    assert first.score.max() == pytest.approx(1, abs=1e-6)
    assert second.flip[7] == 1


def test_pictures_of_other_sizes_are_compared_at_the_querys(tmp_path, pipeline):
    large = np.repeat(np.repeat(np.stack([image(3), image(4)]), 2, axis=1), 2, axis=2)
    dataset = ArrayDataset(large, [["a"], ["b"]])
    (scores,) = scored(tmp_path, pipeline, dataset, "pixel", queries=[Query("", image=image(4))])
    assert scores.rank_of(1) == 1
    assert scores.score[1] > 0.9 > scores.score[0]


@pytest.mark.parametrize("method", ["clip", "dino", "dinov2"])
def test_features_score_by_their_cosine(tmp_path, pipeline, dataset, towers, method):
    tower = load_tower(towers / method)
    own = images_of(dataset)
    both = np.stack([image_features(tower, own), image_features(tower, own[:, :, ::-1])])
    queries = image_features(tower, np.stack([q.image for q in QUERIES]).astype(np.float32) / 127.5 - 1)
    expected = np.stack([cosine(view, queries) for view in both]).max(0)
    results = scored(tmp_path, pipeline, dataset, method, tower=str(towers / method))
    for scores, column in zip(results, expected.T):
        np.testing.assert_array_equal(scores.row_id, dataset.row_ids)
        np.testing.assert_allclose(scores.score, column, atol=2e-5)


@pytest.mark.parametrize("captions", ["first", "all"])
def test_clip_text_compares_the_prompt_with_captions(tmp_path, pipeline, dataset, towers, captions):
    tower = load_tower(towers / "clip")
    prompts = text_features(tower, [query.prompt for query in QUERIES])
    expected = []
    for row in range(len(dataset)):
        texts = dataset.captions(row)[: None if captions == "all" else 1]
        expected.append(cosine(text_features(tower, texts), prompts).max(0))
    results = scored(tmp_path, pipeline, dataset, "clip-text", tower=str(towers / "clip"), captions=captions)
    for scores, column in zip(results, np.stack(expected).T):
        np.testing.assert_allclose(scores.score, column, atol=1e-6)
        assert scores.flip is None
    assert results[0].rank_of(dataset.row_ids[0]) == 1  # its caption is that prompt


def test_abc_maps_the_features(tmp_path, pipeline, dataset, towers):
    tower = load_tower(towers / "clip")
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 10)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    np.savez(tmp_path / "head.npz", mapping=weight, offset=bias)
    mapped = image_features(tower, images_of(dataset)) @ weight.T + bias
    query = image_features(tower, QUERIES[0].image[None].astype(np.float32) / 127.5 - 1) @ weight.T + bias
    settings = {"tower": str(towers / "clip"), "feature_head": str(tmp_path / "head.npz"), "flips": "none"}
    (scores,) = scored(tmp_path / "run", pipeline, dataset, "clip-abc", QUERIES[:1], **settings)
    np.testing.assert_allclose(scores.score, cosine(mapped, query)[:, 0], atol=1e-5)


def test_scores_do_not_depend_on_the_other_queries_and_features_are_kept(tmp_path, pipeline, dataset, towers):
    tower = {"tower": str(towers / "clip")}
    together = scored(tmp_path / "a", pipeline, dataset, "clip", **tower)
    (alone,) = scored(tmp_path / "b", pipeline, dataset, "clip", QUERIES[1:2], **tower)
    np.testing.assert_array_equal(together[1].score, alone.score)
    again = Run(pipeline, dataset, StageRoot(tmp_path / "b"))
    (result,) = attribute_queries(again, QUERIES[:1], method_config("clip", **tower))
    assert result.timings["features"][1]  # reused
    np.testing.assert_array_equal(result.scores.score, together[0].score)


def test_a_run_that_was_stopped_goes_on_from_what_is_stored(tmp_path, pipeline, towers, monkeypatch):
    # More captions than a chunk holds.
    captions = [[f"hat {row} {place}" for place in range(30)] for row in range(37)]
    dataset = ArrayDataset(np.stack([image(row) for row in range(37)]), captions)
    tower = {"tower": str(towers / "clip"), "captions": "all"}
    whole = scored(tmp_path / "whole", pipeline, dataset, "clip-text", **tower)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_writes(patch, every=2)
        scored(tmp_path / "run", pipeline, dataset, "clip-text", **tower)
    (chunk,) = (tmp_path / "run").rglob("chunk-*")
    written = chunk.stat().st_mtime_ns
    for resumed, expected in zip(scored(tmp_path / "run", pipeline, dataset, "clip-text", **tower), whole):
        np.testing.assert_array_equal(resumed.score, expected.score)
    assert chunk.stat().st_mtime_ns == written


@pytest.mark.parametrize("method", ["pixel", "clip"])
def test_unreadable_images_are_left_out(tmp_path, pipeline, dataset, towers, method):
    damaged = UnreadableImages(dataset, {3, 30}, lambda row: UnreadableRowError("cut off"))
    settings = {} if method == "pixel" else {"tower": str(towers / method)}
    (scores,) = scored(tmp_path, pipeline, damaged, method, QUERIES[:1], **settings)
    np.testing.assert_array_equal(scores.row_id, np.delete(dataset.row_ids, [3, 30]))


def test_two_data_sets_as_one(tmp_path, pipeline, dataset):
    exemplar = ArrayDataset(image(1)[None], [["an exemplar"]])
    both = concatenate(exemplar, dataset)
    scores = scored(tmp_path, pipeline, both, "pixel", queries=QUERIES[:1])[0]
    assert scores.rank_of(both.row_ids[0]) == 1 and len(scores) == len(dataset) + 1


def test_settings_hold_the_content_of_towers_and_mappings(towers, tmp_path):
    np.savez(tmp_path / "head.npz", w=np.eye(10, dtype=np.float32))
    clip = method_config("clip", tower=str(towers / "clip")).describe()
    head = str(tmp_path / "head.npz")
    mapped = method_config("clip-abc", tower=str(towers / "clip"), feature_head=head).describe()
    assert clip.keys() == {"method", "tower", "flips"} and mapped.keys() == {*clip, "feature_head"}
    assert mapped["tower"] == clip["tower"]
    copied = shutil.copytree(towers / "clip", tmp_path / "copy")
    moved = method_config("clip", tower=str(copied))
    assert moved.describe() == clip  # what it holds counts, not where it lies
    (copied / "preprocessor_config.json").write_text((copied / "preprocessor_config.json").read_text() + " ")
    assert moved.describe() != clip


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("clip", {}, "tower is None.*openai/clip-vit-base-patch32"),
        ("dino", {}, "tower is None.*facebook/dino-vitb16"),
        ("dinov2", {}, "tower is None.*facebook/dinov2-with-registers-large"),
        ("dino-abc", {"tower": "x"}, "feature_head is None.*'dino'"),
        ("clip", {"tower": "x", "feature_head": "y"}, "feature_head is 'y'.*'clip-abc', 'dino-abc'"),
        ("clip", {"tower": "x", "captions": "all"}, "captions is 'all'.*'clip-text'"),
        ("clip-text", {"tower": "x", "flips": "none"}, "flips is 'none'.*'clip'"),
    ],
)
def test_settings_that_are_missing_or_of_other_methods_are_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method_config(method, **settings)


def test_wrong_families_and_latents_without_images_are_refused(tmp_path, pipeline, dataset, towers):
    with pytest.raises(ValueError, match="family 'dino'.* 'clip'"):
        scored(tmp_path / "run", pipeline, dataset, "clip", tower=str(towers / "dino"))
    encode(StageRoot(tmp_path / "encoded"), pipeline, {}, make_dataset(3))
    latents = open_latents(tmp_path / "encoded")
    for data in (latents, concatenate(dataset, latents)):
        with pytest.raises(ValueError, match="'pixel'.*latents.*--images"):
            check_images(data, "pixel")


def test_shipped_tower_is_the_default_of_openmoji_alone():
    assert default_tower("clip", "folder:x") is None
    assert default_tower("dino", "openmoji") is None
    assert load_tower(default_tower("clip-text", "openmoji")).family == "clip"


def test_rows_are_independent_of_how_many_there_are(towers):
    tower = load_tower(towers / "clip")
    images = images_of(make_dataset(21))
    np.testing.assert_array_equal(image_features(tower, images)[17:], image_features(tower, images[17:]))


@pytest.mark.parametrize("method", ["pixel", "clip"])
def test_other_images_beside_the_same_latents_are_another_data_set(tmp_path, pipeline, towers, method):
    first, second = make_dataset(seed=0), make_dataset(seed=1)
    encode(StageRoot(tmp_path / "encoded"), pipeline, {}, first)
    query = [Query("", image=second[3].image)]
    settings = {} if method == "pixel" else {"tower": str(towers / method)}
    beside = [open_latents(tmp_path / "encoded", images) for images in (first, second)]
    (other,) = scored(tmp_path / "run", pipeline, beside[0], method, query, **settings)
    with pytest.raises(StageMismatchError, match="inputs.images"):
        scored(tmp_path / "run", pipeline, beside[1], method, query, **settings)
    (own,) = scored(tmp_path / "anew", pipeline, beside[1], method, query, **settings)
    assert own.rank_of(second.row_ids[3]) == 1 and other.score.max() < 0.9999
    assert own.score[3] == pytest.approx(1, abs=1e-5)
