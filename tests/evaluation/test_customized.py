"""The task list of the Customized-Model benchmark, and its summary; the other protocol of known answers, self."""

import csv
import json

import numpy as np
import pytest

from attrib_jax.data.concat import concatenate
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.evaluation.customized import (
    CustomizedConfig,
    _without,
    random_rows,
    read_cases,
    run_customized,
    summary,
)
from attrib_jax.evaluation.self_retrieval import SelfConfig, run_self
from attrib_jax.evaluation.self_retrieval import summary as self_summary
from attrib_jax.jobs.context import Run
from attrib_jax.methods import method_config
from attrib_jax.storage.files import make_folder
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from tests.evaluation.conftest import COUNT
from tests.failures import UnreadablePictures


def write_layout(folder, **changes):
    """A task list of two queries of one model, in the benchmark's layout, its files empty."""
    for name in ("models/a", "images/0.png", "images/1.png", "exemplars/x.png", "exemplars/y.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "json").mkdir(exist_ok=True)
    (folder / "json" / "test_objects.json").write_text(
        json.dumps([{"exemplar": ["unused"]}, {"exemplar": ["exemplars/x.png", "exemplars/y.png"]}])
    )
    task = {
        "model_path": "models/a",
        "synth_image_path": "images/0.png",
        "prompt": "photo of a <new1> dog",
        "train_prompt": "<new1> dog",
        "test_case": "json/test_objects.json",
        "test_case_ind": 1,
        "category": "object",
    } | changes
    (folder / "tasks.json").write_text(json.dumps([task, task | {"synth_image_path": "images/1.png"}]))
    return folder / "tasks.json"


def test_a_task_list_is_read(tmp_path):
    cases = read_cases(write_layout(tmp_path))
    assert [case.image for case in cases] == [tmp_path / "images" / f"{number}.png" for number in (0, 1)]
    assert cases[0].exemplars == (tmp_path / "exemplars" / "x.png", tmp_path / "exemplars" / "y.png")
    assert cases[0].model == tmp_path / "models" / "a" and cases[0].category == "object"


def test_a_task_list_as_it_is_published(tmp_path):
    file = write_layout(tmp_path, test_case="test_objects")
    lists = tmp_path / "json" / "test_objects.json"
    lists.write_text(lists.read_text().replace("exemplars/", "dataset/exemplars/"))
    assert read_cases(file)[0].exemplars == (tmp_path / "exemplars" / "x.png", tmp_path / "exemplars" / "y.png")
    with pytest.raises(FileNotFoundError, match="test_absent"):
        read_cases(write_layout(tmp_path, test_case="test_absent"))


def test_random_rows_pass_over_what_cannot_be_read(tiny_dataset, caplog):
    broken = UnreadablePictures(tiny_dataset, {0, 3}, lambda row: UnreadableRowError(f"picture {row} is cut off"))
    taken = random_rows(broken, COUNT - 2)
    np.testing.assert_array_equal(taken.row_ids, np.delete(tiny_dataset.row_ids, [0, 3]))
    assert "picture 3 is cut off" in caplog.text
    with pytest.raises(ValueError, match=f"rows is {COUNT}, but only {COUNT - 2} pictures"):
        random_rows(broken, COUNT)


def test_missing_files_are_all_named(tmp_path):
    file = write_layout(tmp_path)
    for name in ("exemplars/y.png", "images/1.png"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"exemplars/y.png.*images/1.png"):
        read_cases(file)
    # Nothing of it is where another root says.
    with pytest.raises(FileNotFoundError):
        read_cases(file, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_case_ind": 5}, r"test_case_ind 5, but .*\(2 cases\)"),
        ({"test_case_ind": "first"}, "test_case_ind 'first'"),
    ],
)
def test_bad_entries(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_cases(write_layout(tmp_path, **changes))


def test_bad_lists(tmp_path):
    file = tmp_path / "tasks.json"
    for content, message in (
        ("[", "is not valid JSON"),
        ("{}", "holds a dict; expected a list"),
        ("[]", "lists no case"),
        ('[{"prompt": "x"}]', "entry 1 lacks model_path, synth_image_path, train_prompt"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_cases(file)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (method_config(), {}, "method 'm' has no fisher"),
        (method_config(method="influence"), {}, "method 'm' has no fisher"),
        (method_config(update="sgd", cascade=0.1), {}, "method 'm' has a cascade"),
        (method_config(curvature="ekfac"), {"prompt": "photo of a dog"}, "'photo of a dog' does not hold the word"),
    ],
)
def test_what_a_study_needs_is_checked_first(tmp_path, tiny_model, tiny_dataset, method, changes, message):
    cases = read_cases(write_layout(tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        run_customized(tmp_path, tiny_model, tiny_dataset, cases, {"m": method})
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("photo of a <new1> dog", "photo of a dog"),
        ("a <new1>, red", "a , red"),
        ("<new1>", ""),
        ("a <new12>", "a <new12>"),
    ],
)
def test_the_new_word_is_left_out(prompt, expected):
    assert _without(prompt, "<new1>") == expected


def test_words_that_hold_the_new_one_stay():
    assert _without("she asks sks", "sks") == "she asks"


def test_summary_by_hand():
    records = [
        {"model": "a", "method": "m", "form": "with V*", "ranks": [1, 20]},
        {"model": "a", "method": "m", "form": "with V*", "ranks": [1, 2]},
        {"model": "b", "method": "m", "form": "with V*", "ranks": [40]},
        {"model": "a", "method": "m", "form": "without V*", "ranks": [3]},
    ]
    with_token, without = summary(records, 10)
    # Model a: recall 1/2 and 1, precision (1 + 2/20)/2 and 1; model b: 0 and 1/40.
    assert with_token["recall@10"] == pytest.approx((0.75 + 0) / 2)
    assert with_token["mAP"] == pytest.approx(((0.55 + 1) / 2 + 0.025) / 2)
    assert with_token["recall@10 error"] == pytest.approx(0.375)
    assert with_token["median rank"] == 2.0
    assert without["prompt"] == "without V*" and without["mAP"] == pytest.approx(1 / 3)


def test_random_rows_keep_their_ids(tiny_dataset):
    some = random_rows(tiny_dataset, 5)
    assert len(some) == 5 and set(some.row_ids) < set(tiny_dataset.row_ids)
    place = int(np.flatnonzero(tiny_dataset.row_ids == some.row_ids[2])[0])
    np.testing.assert_array_equal(some[2].image, tiny_dataset[place].image)
    assert random_rows(tiny_dataset, 0) is tiny_dataset
    with pytest.raises(ValueError, match="rows is 99"):
        random_rows(tiny_dataset, 99)


def test_random_rows_of_latents(tmp_path):
    with pytest.raises(ValueError, match="rows is 2, but 'latents:.*' holds latents"):
        random_rows(write_latents(tmp_path, np.random.default_rng(0).normal(size=(8, 16, 2, 2))), 2)


def write_latents(folder, latents):
    """Half as many pictures, with random text states."""
    text = np.random.default_rng(1).normal(size=(len(latents) // 2, 1, 4, 32))
    np.save(folder / "x_latents.npy", latents.astype(np.float32))
    np.save(folder / "x_text_embeddings.npy", text.astype(np.float32))
    return open_latents(folder)


def test_self_queries_of_latents_alone_have_their_own_text_states(tmp_path, tiny_model, monkeypatch):
    folder = make_folder(tmp_path / "latents")
    dataset = write_latents(folder, np.random.default_rng(0).normal(size=(8, 16, 2, 2)))
    asked = []

    def note(attributor, name, method, queries):
        asked.extend(queries)
        return np.zeros((len(queries), len(dataset)))

    monkeypatch.setattr("attrib_jax.evaluation.self_retrieval.method_scores", note)
    with lock(tmp_path / "work"):
        attributor = Run(tiny_model, dataset, StageRoot(tmp_path / "work"))
        run_self(attributor, {"random": method_config(method="random")}, SelfConfig(2))
    places = SelfConfig(2).positions(4)
    np.testing.assert_array_equal([query.text for query in asked], dataset.text[places])
    np.testing.assert_array_equal([query.latents for query in asked], dataset.latents[places, 0])


def test_self_queries_of_a_workdir_that_left_pictures_out_have_their_own_captions(attributor, tmp_path, monkeypatch):
    """With the pictures at hand, and behind exemplars: captions and groups are those of the stored rows."""
    broken = UnreadablePictures(attributor.dataset, {1}, lambda row: UnreadableRowError("cut off"))
    model, asked = attributor.pipeline, []
    with lock(tmp_path / "first"):
        assert len(Run(model, broken, StageRoot(tmp_path / "first")).data) == COUNT - 1
    stored = open_latents(tmp_path / "first", images=attributor.dataset)
    exemplars = ArrayDataset(np.zeros((2, *attributor.dataset[0].image.shape), np.uint8), [["x"], ["y"]])
    monkeypatch.setattr(
        "attrib_jax.evaluation.self_retrieval.method_scores",
        lambda attributor, name, method, queries: (
            asked.append(queries) or np.zeros((len(queries), len(attributor.data)))
        ),
    )
    for name, dataset in (("alone", stored), ("behind", concatenate(exemplars, stored))):
        with lock(tmp_path / name):
            again = Run(model, dataset, StageRoot(tmp_path / name))
            np.testing.assert_array_equal(again.data.row_ids, dataset.row_ids)
            run_self(again, {"random": method_config(method="random")}, SelfConfig(5))
        places = SelfConfig(5).positions(len(dataset))
        assert [query.prompt for query in asked[-1]] == [dataset.captions(place)[0] for place in places]
        latents, _ = again.data.inputs(places, 0, 0)
        np.testing.assert_array_equal([query.latents for query in asked[-1]], latents)


def test_config_needs_a_token():
    with pytest.raises(ValueError, match="token is empty"):
        CustomizedConfig(token="")


def test_self_splits_do_not_meet():
    splits = [SelfConfig(6, split).positions(COUNT) for split in ("reported", "tuning")]
    assert not set(splits[0]) & set(splits[1])
    with pytest.raises(ValueError, match="at most half"):
        SelfConfig(7).positions(COUNT)


def test_self_summary_by_hand():
    scores = np.array([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    result = self_summary(scores, np.array([1, 0]), np.array([0, 0, 1, 1]))
    # Own ranks 2 and 4; the best of their group 1 and 3.
    assert result["median rank (own)"] == 3.0 and result["median rank (group)"] == 2.0
    assert result["recall@1 (own)"] == 0.0 and result["recall@1 (group)"] == 0.5
    assert "median rank (group)" not in self_summary(scores, np.array([1, 0]), None)


def test_self_ranks_each_querys_own_picture(attributor):
    methods = {
        "linear": method_config(update="sgd", weights="all", score="linear", flips="none", stride=125, query_draws=64),
        "pixel": method_config(method="pixel", flips="none"),
    }
    text = run_self(attributor, methods, SelfConfig(4))
    assert "| linear |" in text and "4 reported training pictures" in text
    folder = attributor.root.workdir / "evaluation" / "self-reported"
    with open(folder / "self.csv", encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    # The queries are training pictures, which nothing else is as similar to.
    assert rows["pixel"]["median rank (own)"] == "1.0" and rows["pixel"]["recall@1 (own)"] == "1.0"
    assert not list(folder.glob("*unfinished*"))
