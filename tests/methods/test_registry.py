"""The registry of methods: every config is frozen, documented and stored as JSON, and a new method is one entry."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest

from attrib_jax.attribute import attribute_to_files
from attrib_jax.core.settings import declared, setting
from attrib_jax.core.types import Scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.jobs.settings import CaptionSettings
from attrib_jax.methods import METHODS, Method, MethodConfig, Scored, check_method, method_config, queries_per_pass
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError

# What a config cannot do without.
NEEDED = {
    "clip": ["tower"],
    "clip-text": ["tower"],
    "dino": ["tower"],
    "dinov2": ["tower"],
    "clip-abc": ["tower", "feature_head"],
    "dino-abc": ["tower", "feature_head"],
    "ensemble": ["ensemble_methods"],
}


@pytest.fixture
def make(tmp_path):
    """The config of a method by name, with files where it needs them."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")

    def config(method, **settings):
        places = {
            "tower": str(tmp_path),
            "feature_head": str(tmp_path / "config.json"),
            "ensemble_methods": ("pixel", "random"),
        }
        return method_config(method, **{name: places[name] for name in NEEDED.get(method, [])}, **settings)

    return config


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_documented_in_full_phrases(name):
    method = METHODS[name]
    assert len(method.summary.split()) >= 2
    fields = declared(method.config)
    assert fields.keys() == {field.name for field in dataclasses.fields(method.config)} - {"parts"}
    for field in fields.values():
        text = field.setting.help
        assert re.fullmatch(r"[A-Z].*\.", text) and len(text.split()) >= 2, (field.name, text)
        # A fragment such as "Of the stored latents." tells nothing where it stands alone.
        assert not text.startswith(("Of ", "With ", "In ")), (field.name, text)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_is_frozen_and_says_what_decides_the_scores_as_json(name, make):
    config = make(name)
    assert config.method == name and isinstance(config, METHODS[name].config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.method = "random"
    described = config.describe()
    assert json.loads(json.dumps(described)) == described and described["method"] == name
    assert not {"batch_size", "queries_per_pass"} & described.keys()
    for field in declared(type(config)).values():
        choices, default = field.setting.choices, field.default
        assert choices is None or set(default if field.many else [default]) <= {*choices}


@pytest.mark.parametrize("name", METHODS)
def test_every_choice_is_taken_and_no_other(name, make):
    for field in declared(METHODS[name].config).values():
        if field.setting.choices is not None and field.name != "method":
            for choice in field.setting.choices:
                value = (choice,) if field.many else choice
                assert getattr(make(name, **{field.name: value}), field.name) == value
            with pytest.raises(ValueError, match=f"{field.name} '{choice}x': did you mean '{choice}'"):
                make(name, **{field.name: (f"{choice}x",) if field.many else f"{choice}x"})


@pytest.mark.parametrize(
    ("method", "name", "value", "owners"),
    [
        ("unlern", "", "", "did you mean 'unlearn'"),
        ("trak", "region", (0, 0, 8, 8), "'unlearn', 'influence'"),
        ("pixel", "region_mask", "mask.png", "'unlearn', 'influence'"),
        ("das", "cascade", 0.5, "'unlearn', 'influence'"),
        ("d-trak", "score", "linear", "'unlearn'"),
        ("influence", "steps", 2, "'unlearn'"),
        ("random", "stride", 50, "'unlearn', 'influence', 'trak'"),
        ("unlearn", "tower", "folder", "'clip', 'clip-text'"),
        ("unlearn", "colour", "red", "none"),
    ],
)
def test_settings_of_other_methods_are_refused_naming_these(method, name, value, owners):
    with pytest.raises(ValueError, match=owners) as error:
        method_config(method, **{name: value} if name else {})
    assert name in str(error.value) and (repr(value) in str(error.value) or not name)


def test_values_that_the_model_does_not_have_are_refused_before_any_work(run):
    for settings, message in (
        ({"stride": 2000}, "stride is 2000"),
        ({"cascade": 0.1, "cascade_stride": 2000}, "cascade_stride is 2000"),
        ({"method": "journey-trak", "journey_timestep": 1000}, "journey_timestep is 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            check_method(run, method_config(**settings))


def test_queries_of_a_pass_are_as_many_as_weights_fit_in_memory(run):
    moved = 2**31 // (4 * sum(leaf.size for leaf in _leaves(run.select("all")[0])))
    assert queries_per_pass(run, method_config(weights="all")) == moved
    assert queries_per_pass(run, method_config()) > moved
    assert queries_per_pass(run, method_config(queries_per_pass=3)) == 3
    assert queries_per_pass(run, method_config("pixel")) == queries_per_pass(run, method_config("random")) > 100


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthConfig(MethodConfig, CaptionSettings):
    """Settings of a method that the registry does not have: captions as long as the prompt count most."""

    method: str = setting("length", "Attribution method.", choices=("length",))
    weight: float = setting(1.0, "Weight of a character.", above=0)


def prepare_lengths(run, config):
    with run.timed("lengths"):
        captions = [run.dataset.captions(row) for row in range(len(run.dataset))]
        return np.array([len(texts[0] if config.captions == "first" else max(texts, key=len)) for texts in captions])


def score_lengths(run, queries, config):
    lengths = prepare_lengths(run, config)
    scores = [-config.weight * abs(lengths - len(query.prepared.prompt)) for query in queries]
    return [Scored(Scores(run.dataset.row_ids, score)) for score in scores]


def test_a_new_method_is_one_entry(pipeline, dataset, tmp_path, monkeypatch):
    method = Method(LengthConfig, prepare_lengths, score_lengths, "lengths of captions")
    monkeypatch.setitem(METHODS, "length", method)
    image = dataset[0].image
    queries = [Query(prompt="grinning face 1", image=image), Query(prompt="hat", image=image)]
    root, config = StageRoot(tmp_path), method_config("length", weight=2.0)

    results = attribute_to_files(pipeline, dataset, queries, config, root, model_name="tiny", top_k=3)
    for query, result in zip(queries, results):
        expected = [-2.0 * abs(len(dataset.captions(row)[0]) - len(query.prompt)) for row in range(len(dataset))]
        np.testing.assert_array_equal(result.scores.score, expected)
        np.testing.assert_array_equal(np.load(result.folder / "scores.npz")["score"], expected)
        with (result.folder / "top.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 3 and float(rows[0]["score"]) == max(expected)
        manifest = json.loads((result.folder / "manifest.json").read_text())
        assert manifest["settings"]["weight"] == 2.0 and "lengths" in manifest["timings_seconds"]
        assert {"report.html", "sheet.png", "query.png"} <= {path.name for path in result.folder.iterdir()}
    assert results[0].scores.row_id[results[0].scores.score.argmax()] == dataset.row_ids[1]
    # A result is reused under its own settings, and refused under others.
    names = [result.name for result in results]
    again = attribute_to_files(pipeline, dataset, queries, config, root, names=names, model_name="tiny")
    assert again[0].timings["scores"][1] and "lengths" not in again[0].timings
    with pytest.raises(StageMismatchError, match=r"settings\.weight"):
        attribute_to_files(pipeline, dataset, queries, method_config("length"), root, names=names, model_name="tiny")


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("run")))
