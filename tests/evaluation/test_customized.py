"""The Customized-Model benchmark: its task list, what it refuses and its summary."""

import json

import numpy as np
import pytest

from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.latents import open_latents
from attrib_jax.evaluation.customized import (
    CustomizedConfig,
    random_rows,
    read_cases,
    run_customized,
    summary,
    without_word,
)
from attrib_jax.methods import method_config
from tests.evaluation.conftest import COUNT
from tests.failures import UnreadableImages


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
    broken = UnreadableImages(tiny_dataset, {0, 3}, lambda row: UnreadableRowError(f"picture {row} is cut off"))
    taken = random_rows(broken, COUNT - 2)
    np.testing.assert_array_equal(taken.row_ids, np.delete(tiny_dataset.row_ids, [0, 3]))
    assert "picture 3 is cut off" in caplog.text
    with pytest.raises(ValueError, match=f"rows is {COUNT}"):
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


@pytest.mark.parametrize("place", [5, "first", None])
def test_entries_without_their_exemplars(tmp_path, place):
    with pytest.raises(ValueError, match=f"test_case_ind {place!r}"):
        read_cases(write_layout(tmp_path, test_case_ind=place))


@pytest.mark.parametrize(
    ("content", "named"),
    [("[", "tasks.json"), ("{}", "dict"), ("[]", "tasks.json"), ('[{"prompt": "x"}]', "entry 1 lacks model_path")],
)
def test_wrong_lists(tmp_path, content, named):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match=named):
        read_cases(tmp_path / "tasks.json")


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        (method_config(), {}, "'m' has no fisher"),
        (method_config("influence"), {}, "'m' has no fisher"),
        (method_config(update="sgd", cascade=0.1), {}, "'m' has a cascade"),
        (method_config(curvature="ekfac"), {"prompt": "photo of a dog"}, "'photo of a dog' does not hold"),
        (method_config("pixel"), {"prompt": "<new12> dog"}, "'<new12> dog' does not hold"),
    ],
)
def test_what_a_study_needs_is_checked_first(tmp_path, tiny_model, tiny_dataset, method, changes, named):
    config = CustomizedConfig(cases=write_layout(tmp_path, **changes))
    with pytest.raises(ValueError, match=named):
        run_customized(tmp_path, tiny_model, tiny_dataset, {"m": method}, config)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("photo of a <new1> dog", "photo of a dog"),
        ("a <new1>, red", "a , red"),
        ("<new1>", ""),
        ("a <new12>", "a <new12>"),
        ("<new1>s and <new1>.", "<new1>s and ."),
    ],
)
def test_the_new_word_is_left_out(prompt, expected):
    assert without_word(prompt, "<new1>") == expected


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
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x_latents.npy", rng.normal(size=(8, 16, 2, 2)).astype(np.float32))
    np.save(tmp_path / "x_text_embeddings.npy", rng.normal(size=(4, 1, 4, 32)).astype(np.float32))
    with pytest.raises(ValueError, match="rows is 2"):
        random_rows(open_latents(tmp_path), 2)


@pytest.mark.parametrize(("setting", "value"), [("token", ""), ("rows", -1), ("recall_k", 0)])
def test_wrong_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
        CustomizedConfig(**{setting: value})
