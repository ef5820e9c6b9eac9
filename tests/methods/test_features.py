"""The similarity methods through `Run`: their scores against plain numpy, resume, and bad input."""

import shutil

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.jobs.context import Run
from attrib_jax.attribution.features import image_features, text_features
from attrib_jax.convert.tower import load_tower
from attrib_jax.core.types import Scores
from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.encode import encode
from attrib_jax.jobs.query import Query
from attrib_jax.methods import features as features_stage
from attrib_jax.methods import method_config
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
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


def run(workdir, pipeline, dataset, method, features=None, queries=QUERIES, **settings) -> list[Scores]:
    attributor = Run(pipeline, dataset, StageRoot(workdir))
    config = method_config(method=method, features=features or FeatureSettings(), **settings)
    return [result.scores for result in attribute_queries(attributor, queries, config)]


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = (x.reshape(len(x), -1).astype(np.float64) for x in (left, right))
    return (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)


def pictures(dataset) -> np.ndarray:
    return np.stack([dataset[i].image for i in range(len(dataset))]).astype(np.float32) / 127.5 - 1


@pytest.mark.parametrize("flips", ["max", "mean", "none"])
def test_pixel_is_the_cosine_of_flattened_pixels(tmp_path, pipeline, dataset, flips):
    own = pictures(dataset)
    queries = np.stack([query.image for query in QUERIES]).astype(np.float32) / 127.5 - 1
    both = np.stack([cosine(own, queries), cosine(own[:, :, ::-1], queries)])
    expected = {"max": both.max(0), "mean": both.mean(0), "none": both[0]}[flips]
    results = run(tmp_path, pipeline, dataset, "pixel", flips=flips)
    for scores, column in zip(results, expected.T):
        np.testing.assert_array_equal(scores.row_id, dataset.row_ids)
        np.testing.assert_allclose(scores.score, column, atol=1e-6)
    if flips == "max":
        np.testing.assert_array_equal(results[0].flip, both.argmax(0)[:, 0])


def test_pixel_finds_a_training_picture_and_its_mirror_image(tmp_path, pipeline, dataset):
    queries = [Query("", image=dataset[5].image), Query("", image=dataset[7].image[:, ::-1].copy())]
    first, second = run(tmp_path, pipeline, dataset, "pixel", queries=queries)
    assert first.rank_of(dataset.row_ids[5]) == second.rank_of(dataset.row_ids[7]) == 1
    assert first.score.max() == pytest.approx(1, abs=1e-6)
    assert second.flip[7] == 1


def test_pictures_of_other_sizes_are_compared_at_the_querys(tmp_path, pipeline):
    large = np.repeat(np.repeat(np.stack([image(3), image(4)]), 2, axis=1), 2, axis=2)
    dataset = ArrayDataset(large, [["a"], ["b"]])
    (scores,) = run(tmp_path, pipeline, dataset, "pixel", queries=[Query("", image=image(4))])
    assert scores.rank_of(1) == 1
    assert scores.score[1] > 0.9 > scores.score[0]


@pytest.mark.parametrize("method", ["clip", "dino", "dinov2"])
def test_features_score_by_their_cosine(tmp_path, pipeline, dataset, towers, method):
    tower = load_tower(towers / method)
    own = pictures(dataset)
    both = np.stack([image_features(tower, own), image_features(tower, own[:, :, ::-1])])
    queries = image_features(tower, np.stack([q.image for q in QUERIES]).astype(np.float32) / 127.5 - 1)
    expected = np.stack([cosine(view, queries) for view in both]).max(0)
    results = run(tmp_path, pipeline, dataset, method, FeatureSettings(str(towers / method)))
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
    results = run(tmp_path, pipeline, dataset, "clip-text", FeatureSettings(str(towers / "clip")), captions=captions)
    for scores, column in zip(results, np.stack(expected).T):
        np.testing.assert_allclose(scores.score, column, atol=1e-6)
        assert scores.flip is None
    assert results[0].rank_of(dataset.row_ids[0]) == 1  # its caption is that prompt


def test_abc_maps_the_features(tmp_path, pipeline, dataset, towers):
    tower = load_tower(towers / "clip")
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 10)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    np.savez(tmp_path / "head.npz", mapping=weight, offset=bias)
    mapped = image_features(tower, pictures(dataset)) @ weight.T + bias
    query = image_features(tower, QUERIES[0].image[None].astype(np.float32) / 127.5 - 1) @ weight.T + bias
    settings = FeatureSettings(str(towers / "clip"), str(tmp_path / "head.npz"))
    scores = run(tmp_path / "run", pipeline, dataset, "clip-abc", settings, QUERIES[:1], flips="none")[0]
    np.testing.assert_allclose(scores.score, cosine(mapped, query)[:, 0], atol=1e-5)


def test_scores_do_not_depend_on_the_other_queries_and_features_are_kept(tmp_path, pipeline, dataset, towers):
    features = FeatureSettings(str(towers / "clip"))
    together = run(tmp_path / "a", pipeline, dataset, "clip", features)
    alone = run(tmp_path / "b", pipeline, dataset, "clip", features, QUERIES[1:2])[0]
    np.testing.assert_array_equal(together[1].score, alone.score)
    again = Run(pipeline, dataset, StageRoot(tmp_path / "b"))
    result = again.attribute(QUERIES[0], method_config(method="clip", features=features))
    assert result.timings["features"][1]  # reused
    np.testing.assert_array_equal(result.scores.score, together[0].score)


def test_a_run_that_was_stopped_goes_on_from_its_chunks(tmp_path, pipeline, dataset, towers, monkeypatch):
    features = FeatureSettings(str(towers / "clip"))
    whole = run(tmp_path / "whole", pipeline, dataset, "clip", features)[0]
    original = features_stage.make_store

    def small_chunks(path, field, shape, dtype, num_rows):
        store = original(path, field, shape, dtype, num_rows)
        store.rows_per_chunk = 8
        return store

    monkeypatch.setattr(features_stage, "make_store", small_chunks)
    reads = []

    class Stopping:
        """The data set, failing once at row 20."""

        def __init__(self):
            self.__dict__ |= {name: getattr(dataset, name) for name in ("name", "row_ids", "groups", "credit")}
            self.fail = True

        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            if self.fail and index >= 20:
                raise OSError("the disk is gone")
            reads.append(index)
            return dataset[index]

        captions, fingerprint = dataset.captions, dataset.fingerprint

    stopping = Stopping()
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path / "run", pipeline, stopping, "clip", features)
    stopping.fail = False
    reads.clear()
    resumed = run(tmp_path / "run", pipeline, stopping, "clip", features)[0]
    assert min(reads) >= 8  # the chunks that were whole are not read again
    np.testing.assert_array_equal(resumed.score, whole.score)


def test_unreadable_pictures_are_left_out(tmp_path, pipeline, dataset, towers):
    class Damaged:
        def __init__(self):
            self.__dict__ |= {name: getattr(dataset, name) for name in ("name", "row_ids", "groups", "credit")}

        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            if index in (3, 30):
                raise UnreadableRowError("cut off")
            return dataset[index]

        captions, fingerprint = dataset.captions, dataset.fingerprint

    for method, features in (("pixel", FeatureSettings()), ("clip", FeatureSettings(str(towers / "clip")))):
        scores = run(tmp_path / "run", pipeline, Damaged(), method, features, QUERIES[:1])[0]
        np.testing.assert_array_equal(scores.row_id, np.delete(dataset.row_ids, [3, 30]))


def test_two_data_sets_as_one(tmp_path, pipeline, dataset):
    exemplar = ArrayDataset(image(1)[None], [["an exemplar"]])
    both = concatenate(exemplar, dataset)
    scores = run(tmp_path, pipeline, both, "pixel", queries=QUERIES[:1])[0]
    assert scores.rank_of(both.row_ids[0]) == 1 and len(scores) == len(dataset) + 1


def test_settings_hold_what_the_method_reads(towers, tmp_path):
    features = FeatureSettings(str(towers / "clip"), str(tmp_path / "head.npz"))
    np.savez(tmp_path / "head.npz", w=np.eye(10, dtype=np.float32))
    plain = method_config(features=features).settings()
    assert plain == method_config().settings() and "features" not in plain
    clip = method_config(method="clip", features=features).settings()["features"]
    mapped = method_config(method="clip-abc", features=features).settings()["features"]
    assert clip.keys() == {"tower"} and mapped.keys() == {"tower", "head"} and mapped["tower"] == clip["tower"]
    copied = shutil.copytree(towers / "clip", tmp_path / "copy")
    moved = method_config(method="clip", tower=str(copied))
    assert moved.settings()["features"] == clip  # what it holds counts, not where it lies
    (copied / "preprocessor_config.json").write_text((copied / "preprocessor_config.json").read_text() + " ")
    assert moved.settings()["features"] != clip


@pytest.mark.parametrize(
    ("method", "features", "message"),
    [
        ("clip", {}, "method 'clip' needs a tower.*--tower.*openai/clip-vit-base-patch32"),
        ("dino", {}, "facebook/dino-vitb16"),
        ("dinov2", {}, "facebook/dinov2-with-registers-large"),
        ("dino-abc", {"tower": "x"}, "'dino-abc' maps.*--feature_head"),
    ],
)
def test_what_a_method_lacks_is_named(method, features, message):
    with pytest.raises(ValueError, match=message):
        method_config(method=method, tower=**features)


def test_wrong_families_and_latents_without_pictures_are_refused(tmp_path, pipeline, dataset, towers):
    with pytest.raises(ValueError, match=r"of the family 'dino' \(model_type='vit'\); expected 'clip'"):
        run(tmp_path, pipeline, dataset, "clip", FeatureSettings(str(towers / "dino")))
    from attrib_jax.data.latents import NumpyLatents

    latents = NumpyLatents.__new__(NumpyLatents)
    latents.images, latents.name = None, "latents:somewhere"
    with pytest.raises(
        ValueError, match="'pixel' compares pictures.*'latents:somewhere' holds latents alone.*--images"
    ):
        features_stage.check_pictures(latents, "pixel")


def test_shipped_tower_is_the_default_of_openmoji_alone():
    assert default_tower("clip", "folder:x") is None
    assert default_tower("dino", "openmoji") is None
    assert load_tower(default_tower("clip-text", "openmoji")).family == "clip"


def test_rows_are_independent_of_how_many_there_are(towers):
    tower = load_tower(towers / "clip")
    images = pictures(make_dataset(21))
    np.testing.assert_array_equal(image_features(tower, images)[17:], image_features(tower, images[17:]))


def test_other_pictures_beside_the_same_latents_are_another_data_set(tmp_path, pipeline, towers):
    first, second = make_dataset(seed=0), make_dataset(seed=1)
    encode(StageRoot(tmp_path / "encoded"), pipeline, {}, first)
    query = [Query("", image=second[3].image)]
    for name, features in (("pixel", None), ("clip", FeatureSettings(tower=str(towers / "clip")))):
        (other,) = run(tmp_path / name, pipeline, open_latents(tmp_path / "encoded", first), name, features, query)
        other_pictures = open_latents(tmp_path / "encoded", second)
        with pytest.raises(StageMismatchError, match="inputs.images"):
            run(tmp_path / name, pipeline, other_pictures, name, features, query)
        (own,) = run(tmp_path / f"{name} anew", pipeline, other_pictures, name, features, query)
        assert (
            own.rank_of(second.row_ids[3]) == 1
            and own.score[3] == pytest.approx(1, abs=1e-5)
            and other.score.max() < 0.9999
        )
