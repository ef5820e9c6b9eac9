"""The verify command on a Custom Diffusion fine-tune: what is trained, what is kept, and what is not read."""

import json
import re
from pathlib import Path

import numpy as np

from tests.launch.calls import call_elsewhere

FLAGS = ["--num_removed=20", "--num_seeds=1", "--measure_stride=500", "--sampler_steps=2", "--mode=customize"]
TRAINING = ["--exemplar_caption=a <new1>", "--initializer_token=heart", "--train_steps=2", "--train_batch_size=4"]


def test_a_fine_tune_is_trained_again_without_exemplars(model, images, tmp_path):
    # Those of other images come after the exemplars, as in an attribution.
    rows = np.arange(40)
    score = np.cos(0.9 * rows)
    np.savez(tmp_path / "scores.npz", row_id=rows, score=score)
    places = [f"--model={model}", f"--workdir={tmp_path / 'run'}", f"--scores={tmp_path / 'scores.npz'}"]
    query = [f"--exemplars=folder:{images}", "--prompt=red <new1>", f"--query={images / '03.png'}", "--workers=0"]
    arguments = [*FLAGS, *TRAINING, *places, *query]
    trained, kept, refused = call_elsewhere(
        "launch.verify", arguments, arguments, [*arguments, "--caption_dropout=0.5"]
    )
    assert trained.code == kept.code == 0, trained.err + kept.err
    assert "3 of 3 fine-tunes to train, 2 steps each" in trained.out and "all 3 fine-tunes are there" in kept.out
    losses = []
    for outcome in (trained, kept):
        report = Path(re.search("report: (.+)", outcome.out)[1])
        content = json.loads(report.with_name("verified.json").read_text())
        assert content["removed"] == np.argsort(-score[:37])[:20].tolist()
        assert report.read_text(encoding="utf-8").count("data:image/png") == 1 + 3 + 20
        losses.append(content["losses"])
    assert losses[0] == losses[1] and len({value for (value,) in losses[0].values()}) == 3
    assert refused.code != 0 and "caption_dropout is 0.5" in refused.err
