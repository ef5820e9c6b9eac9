"""Similarity of regenerated pictures: against PyTorch's tower and the definition, from stored latents alone."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
import transformers

from attrib_jax.convert.tower import load_tower
from attrib_jax.evaluation.counterfactual import MeasureConfig
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, random_positions, run_leave_k_out, top_positions
from attrib_jax.evaluation.named import QuerySet, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.similarity import picture_directions
from attrib_jax.methods import method_config
from tests.evaluation.test_counterfactual import QUERIES, SET, make
from tests.towers import save_torch_tower

CONFIG = LeaveKOutConfig((2,), random_sets=2, seeds=(0, 1))
METHODS = {"m": method_config(method="random")}  # whose scores take no time
PICTURES = MeasureConfig(stride=500, pictures=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower") / "tiny-clip"
    save_torch_tower("clip", path)
    return path


@pytest.fixture(scope="module")
def tower(folder):
    return load_tower(folder)


@pytest.fixture(scope="module")
def by_hand(folder):
    """Cosine similarity of pairs of latents (2, 2, 16) of grey pictures of 8 x 8 pixels, in PyTorch's tower."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

    def features(latents):
        pixels = np.block([[patch.reshape(4, 4) for patch in row] for row in np.float32(latents)])
        grey = np.round(np.clip(pixels * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
        prepared = processor(np.stack([grey] * 3, axis=-1), return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            return model.get_image_features(prepared["pixel_values"]).pooler_output[0].numpy().astype(np.float64)

    def cosine(first, second):
        first, second = features(first), features(second)
        return first @ second / np.linalg.norm(first) / np.linalg.norm(second)

    return cosine


def test_directions_are_those_of_pytorch_and_do_not_depend_on_the_others(tiny_model, tower, by_hand):
    latents = np.random.default_rng(0).normal(0, 0.5, (19, 2, 2, 16))
    directions = picture_directions(tiny_model, tower, latents)
    similarities = directions @ directions[0]
    expected = np.array([by_hand(each, latents[0]) for each in latents])
    assert expected.min() < 0.97
    np.testing.assert_allclose(similarities, expected, atol=1e-5)
    np.testing.assert_array_equal(picture_directions(tiny_model, tower, latents[17:18]), directions[17:18])


def test_the_tables_hold_the_similarity_of_each_query_to_its_regeneration(attributor, tower, by_hand, monkeypatch):
    counterfactuals = make(attributor, measure=PICTURES)
    plain, _ = run_leave_k_out(counterfactuals, METHODS, SET, "reported", CONFIG)
    assert not any("similarity" in name for row in plain for name in row)
    # All models are there: the similarities need no further one, and the models keep their results.
    monkeypatch.setattr(counterfactuals._retrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    rows, text = run_leave_k_out(counterfactuals, METHODS, SET, "reported", CONFIG, tower)
    assert [row["dL"] for row in rows] == [row["dL"] for row in plain]

    def similarity(removed, place):
        drawn = counterfactuals.results([Training(removed, seed) for seed in CONFIG.seeds])["latents"]
        original = counterfactuals.prepared[place].latents
        return np.mean([by_hand(original, each[place]) for each in drawn])

    sets = [random_positions(len(attributor.data), 2, number) for number in range(2)]
    random = np.array([[similarity(removed, place) for place in (1, 2)] for removed in sets])
    scores = method_scores(attributor, "m", METHODS["m"], SET.of("reported"))
    removed = [top_positions(each, attributor.data.row_ids, 2) for each in scores]
    own = np.array([similarity(*pair) for pair in zip(removed, (1, 2))])
    assert np.ptp([*random.ravel(), *own]) > 1e-3
    whole, reference, method = rows
    expected = np.mean([similarity(np.array([], np.int64), place) for place in (1, 2)])
    assert whole["similarity"] == pytest.approx(expected, abs=1e-5)
    assert reference["similarity"] == pytest.approx(random.mean(), abs=1e-5)
    error = np.hypot(*(np.std(random.mean(axis), ddof=1) / np.sqrt(2) for axis in (0, 1)))
    assert reference["similarity error"] == pytest.approx(error, abs=1e-5)
    assert method["similarity"] == pytest.approx(own.mean(), abs=1e-5)
    assert method["similarity error"] == pytest.approx(np.std(own, ddof=1) / np.sqrt(2), abs=1e-5)
    assert "| similarity | similarity error |" in text
    with open(attributor.root.workdir / "evaluation" / "leave-k-out-reported" / "queries.csv") as file:
        stored = [[float(row[name]) for name in ("similarity", "random similarity")] for row in csv.DictReader(file)]
    np.testing.assert_allclose(stored, np.stack([own, random.mean(0)], axis=1), atol=1e-5)


def test_a_model_that_draws_the_query_again_has_similarity_1(attributor, tower, monkeypatch):
    counterfactuals = make(attributor, measure=PICTURES)
    results = counterfactuals.results

    def unchanged(trainings, *args):
        latents = np.stack([query.latents for query in counterfactuals.prepared])
        return results(trainings, *args) | {"latents": np.stack([latents] * len(trainings)).astype(np.float64)}

    monkeypatch.setattr(counterfactuals, "results", unchanged)
    config = LeaveKOutConfig((1,), random_sets=1)
    queries = QuerySet(QUERIES[:1], 0)
    rows, _ = run_leave_k_out(counterfactuals, METHODS, queries, "reported", config, tower)
    assert [row["similarity"] for row in rows] == pytest.approx([1, 1, 1], abs=1e-12)


def test_a_tower_that_cannot_be_used_is_refused_before_any_work(attributor, tower, monkeypatch):
    monkeypatch.setattr("attrib_jax.evaluation.leave_k_out.method_scores", lambda *args: pytest.fail("attributed"))
    with pytest.raises(ValueError, match="are not kept: give --pictures"):
        run_leave_k_out(make(attributor), METHODS, SET, "reported", CONFIG, tower)
    text_alone = dataclasses.replace(tower, processor=None)
    with pytest.raises(ValueError, match="tower is a clip text half alone"):
        run_leave_k_out(make(attributor, measure=PICTURES), METHODS, SET, "reported", CONFIG, text_alone)
