"""The attribute command on folders of SD 3, FLUX.1 and PixArt that diffusers writes."""

import dataclasses

import numpy as np
import pytest

from attrib_jax.convert.transformer_pipeline import FAMILIES
from launch import attribute
from tests.launch.calls import call
from tests.tiny_transformers import make_transformer_pipeline

SIZE = ("--query_draws=64", "--fisher_samples=32", "--stride=250", "--flips=none", "--query_name=own", "--top_k=3")
CASES = {"sd3": "diagonal", "flux": "ekfac", "pixart": "diagonal"}


@pytest.mark.parametrize("kind", CASES)
def test_a_training_image_is_attributed_to_itself(images, tmp_path, monkeypatch, kind):
    for name, family in FAMILIES.items():  # shorter texts compile to the same program and run faster
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(family, t5_tokens=16))
    make_transformer_pipeline(str(tmp_path / kind), kind)
    query = (f"--prompt={(images / '05.txt').read_text().splitlines()[0]}", f"--query={images / '05.png'}")
    flags = (f"--model={tmp_path / kind}", f"--dataset=folder:{images}", f"--workdir={tmp_path / 'run'}")
    code, _, err = call(attribute.main, *flags, *SIZE, *query, f"--curvature={CASES[kind]}")
    assert code == 0, err
    folder = tmp_path / "run" / "attribution" / "own"
    scores = np.load(folder / "scores.npz")["score"]
    assert np.isfinite(scores).all() and len(scores) == 37
    # With random weights an image of the same caption may come before it.
    assert 5 in np.argsort(-scores)[:3] and scores[5] > 0
