"""launch.index and launch.search: an index made, searched, ranked again and measured from the command line."""

import json

import numpy as np
import pytest

from attrib_jax.storage.score_files import read_scores
from tests.launch.calls import call_elsewhere
from tests.towers import save_torch_tower

SAMPLER = ("--sampler_steps=1",)
SMALL = (
    *SAMPLER, "--teacher_queries=5", "--query_holdout=0.4", "--compositions=0", "--student_dim=8", "--student_width=8",
    "--student_epochs=3", "--student_batch=2", "--student_top=5",
)  # fmt: skip
EXACT = ("--query_draws=16", "--fisher_samples=16", "--stride=500", "--flips=none")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir with an index, the outcome of the command that made it, and of one that changes a setting."""
    workdir = tmp_path_factory.mktemp("work")
    tower = workdir.parent / f"{workdir.name}-tower"
    save_torch_tower("clip", tower)
    base = ["--model=tiny", f"--workdir={workdir}", f"--tower={tower}", *SMALL, "--method=pixel"]
    calls = [base, [*base, "--student_features=image,image"], [*base, "--stride=250"], [*base, "--refresh"]]
    return workdir, tower, call_elsewhere("launch.index", *calls, tiny=True)


def test_an_index_is_made_updated_and_wrong_settings_are_refused(made):
    workdir, _, (first, repeated, unread, updated) = made
    assert first.code == 0, first.err
    record = json.loads((workdir / "index" / "index.json").read_text())
    assert record["held_out"]["queries"] == 2 and f"{workdir}/index" in first.out
    assert "student_features is ('image', 'image')" in repeated.err and repeated.code == 1
    assert "stride is 250, but method 'pixel' does not read it" in unread.err
    assert updated.code == 0 and "0 images added, 0 removed" in updated.out, updated.err


def test_searches_write_what_an_attribution_writes(made, tmp_path):
    workdir, tower, _ = made
    base = ["--model=tiny", f"--workdir={workdir}", *SAMPLER]
    one = [*base, "--prompt=hat", "--query_name=one"]
    (tmp_path / "queries.jsonl").write_text('{"prompt": "hat", "name": "a"}\n{"prompt": "flag", "name": "b"}\n')
    calls = [
        one,
        [*base, f"--queries={tmp_path}/queries.jsonl"],
        [*base, "--prompt=hat", "--query_name=exact", "--rerank=6", *EXACT],
        [*base, "--benchmark=4"],
        [*base, "--prompt=hat", "--query_name=boxed", "--region=1,1,6,7"],
        [*base, "--prompt=hat", "--region=1,1,99,7"],
        [*one[:-1], "--step_size=0.1"],
        [*base, "--prompt="],
        [*base, "--prompt=hat", f"--index={tmp_path}"],
        [*base, "--prompt=hat", f"--tower={tmp_path}"],
    ]
    single, many, exact, measured, boxed, outside, unread, empty, no_index, no_tower = call_elsewhere(
        "launch.search", *calls, tiny=True
    )
    for outcome in (single, many, exact, measured, boxed):
        assert outcome.code == 0, outcome.err
    folders = {name: workdir / "attribution" / name for name in ("one", "a", "b", "exact", "boxed")}
    for folder in folders.values():
        assert {"scores.npz", "top.csv", "report.html", "query.png", "manifest.json"} <= {*map(_name, folder.iterdir())}
    alone, together = (read_scores(folders[name]) for name in ("one", "a"))
    np.testing.assert_array_equal(alone.score, together.score)
    ranked = read_scores(folders["exact"])
    assert {*ranked.row_id} == {*alone.top(6).row_id} and ranked.loss_before is not None
    line = json.loads(measured.out)
    assert line["recall"] == 1 and line["vectors"] == len(alone) and line["p50_ms"] <= line["p99_ms"]
    assert (read_scores(folders["boxed"]).score != alone.score).any()
    for outcome, message in (
        (outside, "region is (1, 1, 99, 7): expected a box inside"),
        (unread, "step_size is 0.1, but rerank 0 does not read it: step_size belongs to rerank above 0"),
        (empty, "prompt is empty"),
        (no_index, f"index is '{tmp_path}', which has no index.json"),
        (no_tower, str(tmp_path)),
    ):
        assert outcome.code == 1 and message in outcome.err


def _name(path):
    return path.name
