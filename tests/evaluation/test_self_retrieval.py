"""Training images as queries: each should find itself."""

import csv
import json

import numpy as np
import pytest

from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.evaluation.self_retrieval import SelfConfig, run_self, summary
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, query_settings
from attrib_jax.methods import method_config
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from tests.evaluation.conftest import COUNT
from tests.failures import UnreadableImages

RANDOM = {"random": method_config("random")}


def asked(workdir, pipeline, dataset, count):
    """The queries of a study, as its stage stores them, and its encoded data."""
    with lock(workdir):
        run = Run(pipeline, dataset, StageRoot(workdir))
        run_self(run, RANDOM, SelfConfig(self_queries=count))
    (record,) = (workdir / "evaluation" / "scores").glob("*/*/stage.json")
    return json.loads(record.read_text())["settings"]["queries"], run.data


def test_queries_of_latents_alone_have_their_own_text_states(tmp_path, tiny_model):
    rng, folder = np.random.default_rng(0), tmp_path / "latents"
    folder.mkdir()
    np.save(folder / "x_latents.npy", rng.normal(size=(8, 16, 2, 2)).astype(np.float32))
    np.save(folder / "x_text_embeddings.npy", rng.normal(size=(4, 1, 4, 32)).astype(np.float32))
    dataset = open_latents(folder)
    queries, _ = asked(tmp_path / "work", tiny_model, dataset, 2)
    assert queries == [
        query_settings(Query("", latents=dataset.latents[place, 0], text=dataset.text[place]))
        for place in SelfConfig(self_queries=2).positions(4)
    ]


def test_queries_have_their_own_captions_where_images_were_left_out(tmp_path, tiny_model, tiny_dataset):
    broken = UnreadableImages(tiny_dataset, {1}, lambda row: UnreadableRowError("cut off"))
    with lock(tmp_path / "first"):
        assert len(Run(tiny_model, broken, StageRoot(tmp_path / "first")).data) == COUNT - 1
    stored = open_latents(tmp_path / "first", images=tiny_dataset)
    exemplars = ArrayDataset(np.zeros((2, *tiny_dataset[0].image.shape), np.uint8), [["x"], ["y"]])
    for name, dataset in (("alone", stored), ("behind", concatenate(exemplars, stored))):
        queries, data = asked(tmp_path / name, tiny_model, dataset, 5)
        places = SelfConfig(self_queries=5).positions(len(dataset))
        latents, _ = data.inputs(places, 0, 0)
        assert queries == [
            query_settings(Query(dataset.captions(place)[0], latents=np.asarray(each)))
            for place, each in zip(places, latents)
        ]


def test_splits_do_not_overlap():
    splits = [SelfConfig(self_queries=6, split=split).positions(COUNT) for split in ("reported", "tuning")]
    assert not set(splits[0]) & set(splits[1])
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"self_queries is {count}"):
            SelfConfig(self_queries=count).positions(COUNT)


def test_summary_by_hand():
    scores = np.array([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    result = summary(scores, np.array([1, 0]), np.array([0, 0, 1, 1]))
    # Own ranks 2 and 4; the best of their group 1 and 3.
    assert result["median rank (own)"] == 3.0 and result["median rank (group)"] == 2.0
    assert result["recall@1 (own)"] == 0.0 and result["recall@1 (group)"] == 0.5
    assert "median rank (group)" not in summary(scores, np.array([1, 0]), None)


def test_each_query_finds_its_own_image(run):
    methods = {
        "linear": method_config(update="sgd", weights="all", score="linear", flips="none", stride=125, query_draws=64),
        "pixel": method_config("pixel", flips="none"),
    }
    text = run_self(run, methods, SelfConfig(self_queries=4))
    assert "| linear |" in text and text.startswith("4 reported")
    folder = run.root.workdir / "evaluation" / "self-reported"
    with open(folder / "self.csv", encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["pixel"]["median rank (own)"] == "1.0" and rows["pixel"]["recall@1 (own)"] == "1.0"
    assert not list(folder.glob("*unfinished*"))
