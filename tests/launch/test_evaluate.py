"""`launch.evaluate`: its tables on a tiny model, and flags that do not fit, refused before anything is computed."""

import csv
import json
import re

import pytest

from tests.launch.calls import call_elsewhere
from tests.towers import save_torch_tower

DIGITS, SELF = "--flagfile=configs/evaluate_digits.cfg", "--flagfile=configs/evaluate_self.cfg"
CUSTOMIZED = "--flagfile=configs/evaluate_customized.cfg"
# Arguments, and what the error says of them.
WRONG = {
    "": "--protocol, --model, --workdir, --methods",
    "--protocol=lsd": "'lds'",
    f"{DIGITS} --split=report": "'reported'",
    f"{DIGITS} --methods=nowhere.json": "nowhere.json",
    f"{DIGITS} --only=unlearn-ekfak": "'unlearn-ekfac'",
    f"{DIGITS} --reported_queries=": "--reported_queries",
    f"{DIGITS} --reported_queries=nowhere.jsonl": "nowhere.jsonl",
    f"{DIGITS} --split=tuning --tuning_queries=": "tuning",
    f"{DIGITS} --reported_queries=configs/evaluation/digits_tuning.jsonl": "comes twice",
    f"{DIGITS} --lds_models=9": "lds_models is 9.*'lds'",
    f"{DIGITS} --rows=9": "rows is 9.*'customized'",
    f"{SELF} --train_steps=9": "train_steps is 9.*'leave-k-out', 'lds'",
    f"{SELF} --self_queries=9999": "self_queries is 9999",
    f"{CUSTOMIZED} --nouse_shipped_stages": "use_shipped_stages is False.*'leave-k-out', 'lds', 'self'",
    f"{CUSTOMIZED} --cases=nowhere.json": "nowhere.json",
    f"{CUSTOMIZED} --cases=": "--cases",
    **{f"{DIGITS} --remove={value}": "remove" for value in ("5000", "-1", "inf", "1.5", "x", "2,2", "")},
    f"{DIGITS} --curve=1797": "curve",
    f"{DIGITS} --train_seeds=0,x": "train_seeds",
    f"{DIGITS} --measure_stride=1001": "measure_stride is 1001",
    **{f"{DIGITS} --{name}=inf": f"{name} is inf" for name in ("learning_rate", "guidance_scale")},
    f"{DIGITS} --caption_dropout=nan": "caption_dropout is nan",
    f"{DIGITS} --train_batch_size=0": "train_batch_size",
    f"{DIGITS} --tower=models/openmoji_tower": "pictures",
    f"{DIGITS} --tower=nowhere --pictures": "nowhere",
    f"{DIGITS} --models_per_device=0": "models_per_device",
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    # A workdir for each: it becomes one of the first data set.
    calls = [
        [*arguments.split(" "), f"--workdir={folder / str(number)}"] if arguments else []
        for number, arguments in enumerate(WRONG)
    ]
    return call_elsewhere("launch.evaluate", *calls)


@pytest.mark.parametrize("place", range(len(WRONG)), ids=WRONG)
def test_wrong_flags_are_one_line(wrong, place):
    code, out, err = wrong[place]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and out == "" and len(errors) == 1
    assert re.search(list(WRONG.values())[place], errors[0])


def test_tables_of_a_tiny_model(tmp_path):
    save_torch_tower("dino", tmp_path / "tower")
    (tmp_path / "methods.json").write_text('{"m": {"method": "random"}}')
    (tmp_path / "queries.jsonl").write_text('{"prompt": "digit one"}\n{"prompt": "digit two"}\n')
    shared = ["--model=tiny", f"--workdir={tmp_path / 'work'}", f"--methods={tmp_path}/methods.json"]
    retraining = [f"--reported_queries={tmp_path}/queries.jsonl", "--train_steps=2", "--train_batch_size=2"]
    retraining += ["--sampler_steps=2", "--measure_stride=500"]
    leave_k_out, lds, own = call_elsewhere(
        "launch.evaluate",
        [
            *shared, *retraining, "--protocol=leave-k-out", "--pictures", f"--tower={tmp_path / 'tower'}",
            "--remove=2", "--random_sets=2",
        ],
        [*shared, *retraining, "--protocol=lds", "--lds_models=3"],
        [*shared, "--protocol=self", "--self_queries=3"],
        tiny=True,
    )  # fmt: skip
    assert leave_k_out.code == lds.code == own.code == 0, leave_k_out.err + lds.err + own.err
    assert "| mse | mse_error | similarity | similarity_error |" in leave_k_out.out
    assert "3 subsets of 50%" in lds.out and "| m | " in lds.out and "3 reported" in own.out
    evaluation = tmp_path / "work" / "evaluation"
    for name, rows in (("leave_k_out", ["no images", "random images", "m"]), ("queries", ["m", "m"])):
        with open(evaluation / "leave-k-out-reported" / f"{name}.csv") as file:
            table = list(csv.DictReader(file))
        assert sorted(row["method"] for row in table) == sorted(rows)
        assert all(-1 <= float(row["similarity"]) <= 1 + 1e-9 for row in table)
    stored = json.loads((evaluation / "leave-k-out-reported" / "flags.json").read_text())
    assert stored["tower"] == str(tmp_path / "tower") and stored["remove"] == [2]
    assert all((evaluation / f"{name}-reported" / "flags.json").exists() for name in ("lds", "self"))
