"""`launch.fisher`: the curvature that it leaves in a workdir is the one that the attribute command takes."""

import json

import numpy as np
import pytest

from attrib_jax.storage.files import read_arrays
from tests.launch.calls import call_elsewhere

SHARED = ("--model=tiny", "--fisher_samples=24", "--loss_seed=3")
STAGE = "ekfac/cross-attn-kv-24-seed3"
QUERY = ("--prompt=digit one", "--sampler_steps=2", "--query_draws=16", "--stride=500", "--flips=none", "--top_k=2")
WRONG = {
    "--curvature=kfac": "'ekfac'",
    "--weights=cross-atn-kv": "'cross-attn-kv'",
    "--fisher_samples=0": "fisher_samples",
    "--loss_seed=-1": "loss_seed",
    "--workdir=": "--workdir",
    "stray": "stray",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher")
    right = [*SHARED, f"--workdir={folder / 'before'}", "--curvature=ekfac"]
    wrong = [[*SHARED, f"--workdir={folder / 'wrong'}", arguments] for arguments in WRONG]
    return folder, *call_elsewhere("launch.fisher", right, *wrong, tiny=True)


def test_attribution_takes_the_ekfac_that_was_fitted_before(outcomes):
    folder, (code, out, err), *_ = outcomes
    assert code == 0, err
    assert out == f"EKFAC of 512 values in 2 matrices in {folder / 'before'}/ekfac\n"
    stored = {path.name: path.stat().st_mtime_ns for path in (folder / "before" / STAGE).iterdir()}
    assert stored.keys() == {"stage.json", "bases.safetensors", "eigenvalues.safetensors"}
    attribute = [
        [*SHARED, *QUERY, f"--workdir={folder / workdir}", "--query_name=q", "--curvature=ekfac"]
        for workdir in ("alone", "before")
    ]
    for code, _, err in call_elsewhere("launch.attribute", *attribute, tiny=True):
        assert code == 0, err
    results = [folder / workdir / "attribution" / "q" for workdir in ("alone", "before")]
    alone, before = (np.load(result / "scores.npz")["score"] for result in results)
    np.testing.assert_array_equal(before, alone)
    assert np.abs(before).max() > 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "before" / STAGE).iterdir()} == stored
    assert "ekfac" in json.loads((results[1] / "manifest.json").read_text())["timings_seconds"]
    for name in stored.keys() - {"stage.json"}:
        first, second = (read_arrays(folder / workdir / STAGE / name)[0] for workdir in ("before", "alone"))
        assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


@pytest.mark.parametrize("place", range(len(WRONG)), ids=WRONG)
def test_wrong_flags_are_one_line_and_store_nothing(outcomes, place):
    folder, code, out, err = outcomes[0], *outcomes[2 + place]
    assert code == 1 and out == "" and not (folder / "wrong").exists()
    assert err.count("error: ") == 1 and list(WRONG.values())[place] in err
