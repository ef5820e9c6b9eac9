"""From a LoRA's training to its attribution and its verification, by the commands on a tiny model."""

import json
import re
from pathlib import Path

from tests.launch.calls import call_elsewhere

TRAINING = ["--target_modules=to_v", "--lora_rank=2", "--train_steps=2", "--train_batch_size=4", "--learning_rate=1e-2"]
QUERY = ["--prompt=red hat", "--sampler_steps=2", "--seed=1"]


def test_a_lora_is_trained_attributed_and_verified(model, images, tmp_path):
    def run(command, workdir, *arguments):
        shared = [f"--model={model}", f"--dataset=folder:{images}", "--workers=0", f"--workdir={tmp_path / workdir}"]
        (outcome,) = call_elsewhere(command, [*shared, *arguments])
        assert outcome.code == 0, outcome.err
        return outcome.out

    lora = re.search("lora: (.+)", run("launch.train", "train", "--mode=lora", *TRAINING))[1]
    moved = ["--weights=lora", "--fisher_samples=16", "--query_draws=8", "--stride=500", "--query_name=hat"]
    run("launch.attribute", "work", f"--lora={lora}", *QUERY, *moved)
    result = tmp_path / "work" / "attribution" / "hat"
    assert json.loads((result / "manifest.json").read_text())["settings"]["weights"] == "lora"

    again = ["--num_removed=2", "--num_seeds=1", "--measure_stride=500", f"--scores={result / 'scores.npz'}"]
    output = run("launch.verify", "verify", f"--lora={lora}", *QUERY, *TRAINING, *again)
    assert "3 of 3 adapters to train, 2 steps each" in output and "dL without the top 2: " in output
    report = Path(re.search("report: (.+)", output)[1])
    content = json.loads(report.with_name("verified.json").read_text())
    best = (result / "top.csv").read_text().splitlines()[1:3]
    assert content["removed"] == [int(line.split(",")[1]) for line in best]
    assert report.read_text(encoding="utf-8").count("data:image/png") == 1 + 3 + 2
