"""Leave-K-out on a tiny model: what is removed, measured and refused."""

import csv
import dataclasses

import numpy as np
import pytest

from attrib_jax.evaluation.counterfactual import MeasureConfig
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, random_positions, run_leave_k_out, top_positions
from attrib_jax.evaluation.metrics import half_subsets
from attrib_jax.evaluation.named import QuerySet, method_scores
from attrib_jax.evaluation.retrain import Training
from attrib_jax.jobs.query import Query
from tests.evaluation.conftest import COUNT, METHODS, SET, make_counterfactuals

NOTHING = np.array([], np.int64)


def test_the_top_images_of_each_query_are_removed(run):
    counterfactuals = make_counterfactuals(run)
    config = LeaveKOutConfig(remove=(2,), curve=(6,), random_sets=2)
    rows, text = run_leave_k_out(counterfactuals, METHODS, SET, config)
    assert [(row["method"], row["K"]) for row in rows] == [
        *(("no images", 0), ("random images", 2), ("random", 2), ("unlearn", 2))
    ]
    _, reference, _, unlearn = rows
    scores = method_scores(run, "unlearn", METHODS["unlearn"], SET, "reported")
    top = [np.argsort(-query, kind="stable")[:2] for query in scores]
    full = counterfactuals.results([Training(NOTHING)])["loss"][0]
    after = [counterfactuals.results([Training(removed)])["loss"][0, place] for removed, place in zip(top, (1, 2))]
    assert unlearn["dl"] == pytest.approx(np.mean(after - full[1:]))
    sets = [random_positions(COUNT, 2, number) for number in range(2)]
    random = counterfactuals.results([Training(removed) for removed in sets])["loss"][:, 1:] - full[1:]
    assert reference["dl"] == pytest.approx(random.mean())
    # Of two queries under two sets: half a difference each, the sets' own error in both.
    by_query, by_set = np.ptp(random.mean(0)) / 2, np.ptp(random.mean(1)) / 2
    assert reference["error"] == pytest.approx(np.hypot(by_query, by_set))
    over = after - full[1:] - random.mean(0)
    assert unlearn["over_random"] == pytest.approx(over.mean())
    assert unlearn["over_random_errors"] == pytest.approx(over.mean() / np.hypot(np.ptp(over) / 2, by_set))
    folder = run.root.workdir / "evaluation" / "leave-k-out-reported"
    assert (folder / "leave_k_out.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "queries.csv") as file:
        assert [row["query"] for row in csv.DictReader(file)] == ["digit two", "digit three"] * 2
    assert "| unlearn | 2 |" in text


def test_changes_are_averaged_over_training_seeds(run):
    counterfactuals = make_counterfactuals(run)
    each = [
        run_leave_k_out(
            counterfactuals,
            {"random": METHODS["random"]},
            SET,
            LeaveKOutConfig(split="tuning", remove=(3,), random_sets=1, train_seeds=seeds),
        )[0]
        for seeds in ((0,), (1,), (0, 1))
    ]
    changes = [rows[2]["dl"] for rows in each]
    assert changes[2] == pytest.approx(np.mean(changes[:2])) and changes[0] != changes[1]
    # Models trained on all: their losses are what changes are from, and they draw other images than the queries.
    whole = [rows[0] for rows in each]
    full = counterfactuals.results([Training(NOTHING, seed) for seed in (0, 1)])["mse"][:, 0]
    assert [row["dl"] for row in whole] == [0, 0, 0]
    assert [row["mse"] for row in whole] == pytest.approx([*full, full.mean()])


def test_queries_that_share_a_model_lose_the_union_of_their_images(run):
    words = ("one", "two", "three", "one", "two")
    queries = tuple(
        Query(f"digit {word}", seed=seed, guidance_scale=1.5, sampler_steps=4) for seed, word in enumerate(words)
    )
    counterfactuals, queries = make_counterfactuals(run, queries=queries), QuerySet(queries, 1)
    config = LeaveKOutConfig(remove=(2,), random_sets=2, queries_per_model=2)
    targets, controls = config.groups(queries)
    np.testing.assert_array_equal(targets, [[1, 2], [3, 4]])
    # Of the others only those with prompts of their own: "two" and "three" against "one" and "two".
    np.testing.assert_array_equal(controls, [[3], [2]])
    methods = {"unlearn": METHODS["unlearn"], "default": METHODS["random"]}
    rows, _ = run_leave_k_out(counterfactuals, methods, queries, config)
    scores = method_scores(run, "unlearn", METHODS["unlearn"], queries, "reported")
    top = [np.argsort(-query, kind="stable")[:2] for query in scores]
    unions = [np.union1d(*top[:2]), np.union1d(*top[2:])]
    losses = counterfactuals.results([Training(NOTHING), *map(Training, unions)])["loss"]
    change = losses[1:] - losses[0]
    groups = change[[[0], [1]], targets].mean(axis=1)
    (row,) = (row for row in rows if row["method"] == "unlearn")
    assert row["removed"] == np.mean([len(each) for each in unions])
    assert [row["dl"], row["error"]] == pytest.approx([groups.mean(), np.ptp(groups) / 2])
    assert row["control"] == pytest.approx(np.mean([change[0, 3], change[1, 2]]))
    # Compared with random sets of as many images as two queries name at most.
    sets = [random_positions(COUNT, 4, number) for number in range(2)]
    random = counterfactuals.results([Training(removed) for removed in sets])["loss"][:, 1:] - losses[0, 1:]
    assert row["over_random"] == pytest.approx(groups.mean() - random.mean())
    # And, group by group, with the default.
    (default,) = (row for row in rows if row["method"] == "default")
    assert row["difference"] == pytest.approx(row["dl"] - default["dl"]) and np.isnan(default["difference"])
    assert row["difference_error"] > 0


def test_queries_that_cannot_share_models_are_refused():
    with pytest.raises(ValueError, match="queries_per_model is 3: expected a divisor of the 2 reported"):
        LeaveKOutConfig(queries_per_model=3).groups(SET)
    with pytest.raises(ValueError, match="queries_per_model is 2: expected reported queries whose prompts"):
        LeaveKOutConfig(queries_per_model=2).groups(SET)
    with pytest.raises(ValueError, match="queries_per_model is 5.*15 images.*fewer than the 13"):
        LeaveKOutConfig(remove=(3,), queries_per_model=5).all_counts(COUNT)


def test_regenerated_queries_are_shown(run):
    counterfactuals = make_counterfactuals(run, measure=MeasureConfig(250, pictures=True))
    methods = {"random": METHODS["random"]}
    run_leave_k_out(counterfactuals, methods, SET, LeaveKOutConfig(remove=(2,), random_sets=1))
    file = run.root.workdir / "evaluation" / "leave-k-out-reported" / "pictures.png"
    assert file.read_bytes().startswith(b"\x89PNG")


def test_top_positions_break_ties_by_row_id():
    np.testing.assert_array_equal(top_positions(np.array([1.0, 5.0, 1.0, 1.0]), np.array([9, 4, 2, 7]), 3), [1, 2, 3])


def test_random_sets_are_nested_and_those_of_lds():
    np.testing.assert_array_equal(np.sort(random_positions(21, 11, 3)), np.flatnonzero(~half_subsets(21, 4)[3]))
    assert set(random_positions(21, 5, 3)) < set(random_positions(21, 11, 3))
    assert set(random_positions(21, 5, 3)) != set(random_positions(21, 5, 2))


def test_shares_are_of_the_data_set():
    config = LeaveKOutConfig(remove=(0.25, 5, 0.001), curve=(0.5, 10))
    # A share and a number that come to the same are one.
    assert config.counts(20) == (5, 1) and config.all_counts(20) == [1, 5, 10]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("remove", ()),
        ("remove", (2, 2)),
        ("remove", (-1,)),
        ("remove", (1.5,)),
        ("remove", (float("inf"),)),
        ("remove", (2, float("nan"))),
        ("remove", (COUNT,)),
        ("curve", (COUNT + 1,)),
        ("curve", (0,)),
        ("train_seeds", ()),
        ("train_seeds", (1, 1)),
        ("train_seeds", (2**32,)),
        ("random_sets", 0),
        ("queries_per_model", 0),
        ("split", "report"),
    ],
)
def test_wrong_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=setting):
        LeaveKOutConfig(**{setting: value}).all_counts(COUNT)


def test_a_cascade_has_to_rank_what_is_removed(run):
    cascade = dataclasses.replace(METHODS["unlearn"], cascade=0.1, cascade_stride=500, cascade_min=3)
    with pytest.raises(ValueError, match="cascade is 0.1 for method 'a'"):
        run_leave_k_out(make_counterfactuals(run), {"a": cascade}, SET, LeaveKOutConfig(remove=(4,)))
    assert not (run.root.workdir / "evaluation" / "scores").exists()
