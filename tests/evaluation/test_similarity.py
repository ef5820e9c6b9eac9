"""Similarity of regenerated images: against PyTorch's tower and the definition, from stored latents alone."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
import transformers

from attrib_jax.convert.tower import load_tower
from attrib_jax.evaluation.counterfactual import MeasureConfig
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, random_positions, run_leave_k_out, top_positions
from attrib_jax.evaluation.named import method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.evaluation.similarity import image_directions
from attrib_jax.methods import method_config
from tests.evaluation.conftest import SET, files, make_counterfactuals
from tests.towers import save_torch_tower

CONFIG = LeaveKOutConfig(remove=(2,), random_sets=2, train_seeds=(0, 1))
METHODS = {"m": method_config("random")}  # whose scores take no time
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
    """Cosine similarity of pairs of latents (2, 2, 16) of grey images of 8 x 8 pixels, in PyTorch's tower."""
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
    directions = image_directions(tiny_model, tower, latents)
    similarities = directions @ directions[0]
    expected = np.array([by_hand(each, latents[0]) for each in latents])
    assert expected.min() < 0.97 and similarities[0] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(similarities, expected, atol=1e-5)
    np.testing.assert_array_equal(image_directions(tiny_model, tower, latents[17:18]), directions[17:18])


def test_the_tables_hold_the_similarity_of_each_query_to_its_regeneration(run, tower, by_hand, tmp_path):
    counterfactuals = make_counterfactuals(run, measure=PICTURES)
    plain, _ = run_leave_k_out(counterfactuals, METHODS, SET, CONFIG)
    assert not any("similarity" in name for row in plain for name in row)
    # All models are there: the similarities need no further one.
    stored = files(tmp_path / counterfactuals.name)
    rows, text = run_leave_k_out(counterfactuals, METHODS, SET, CONFIG, tower)
    assert stored and files(tmp_path / counterfactuals.name) == stored
    assert [row["dl"] for row in rows] == [row["dl"] for row in plain]

    def similarity(removed, place):
        drawn = counterfactuals.results([Training(removed, seed) for seed in CONFIG.train_seeds])["latents"]
        original = counterfactuals.prepared[place].latents
        return np.mean([by_hand(original, each[place]) for each in drawn])

    sets = [random_positions(len(run.data), 2, number) for number in range(2)]
    random = np.array([[similarity(removed, place) for place in (1, 2)] for removed in sets])
    scores = method_scores(run, "m", METHODS["m"], SET, "reported")
    removed = [top_positions(each, run.data.row_ids, 2) for each in scores]
    own = np.array([similarity(*pair) for pair in zip(removed, (1, 2))])
    assert np.ptp([*random.ravel(), *own]) > 1e-3
    whole, reference, method = rows
    expected = np.mean([similarity(np.array([], np.int64), place) for place in (1, 2)])
    assert whole["similarity"] == pytest.approx(expected, abs=1e-5)
    assert reference["similarity"] == pytest.approx(random.mean(), abs=1e-5)
    error = np.hypot(*(np.std(random.mean(axis), ddof=1) / np.sqrt(2) for axis in (0, 1)))
    assert reference["similarity_error"] == pytest.approx(error, abs=1e-5)
    assert method["similarity"] == pytest.approx(own.mean(), abs=1e-5)
    assert method["similarity_error"] == pytest.approx(np.std(own, ddof=1) / np.sqrt(2), abs=1e-5)
    assert "| similarity | similarity_error |" in text
    with open(run.root.workdir / "evaluation" / "leave-k-out-reported" / "queries.csv") as file:
        stored = [[float(row[name]) for name in ("similarity", "random similarity")] for row in csv.DictReader(file)]
    np.testing.assert_allclose(stored, np.stack([own, random.mean(0)], axis=1), atol=1e-5)


def test_a_tower_that_cannot_be_used_is_refused_before_any_work(run, tower):
    measured = make_counterfactuals(run, measure=PICTURES)
    for counterfactuals, each, named in (
        (make_counterfactuals(run), tower, "--pictures"),
        (measured, dataclasses.replace(tower, processor=None), "tower is a clip text half"),
    ):
        with pytest.raises(ValueError, match=named):
            run_leave_k_out(counterfactuals, METHODS, SET, CONFIG, each)
    assert not (run.root.workdir / "evaluation").exists()
