"""SIGKILL at random moments of the whole chain of commands: started again, it ends with the bits of a quiet run.

    nice python -m benchmarks.kill_resume --workdir=runs/kill_resume

Trains a tiny model on images made here, encodes them, fits the Fisher information and attributes a query with many
unlearning steps: the real commands, once undisturbed, then again and again with kills until there were `--kills`. A
moment is uniform over the time for which the undisturbed command held its workdir; before that nothing is written. Then
every array, log and table of each killed chain is compared with the undisturbed one's. Prints what each kill hit; the
exit code is 1 if anything differs. Takes half an hour on two cores.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from safetensors import safe_open

from launch import common

_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("kill_seed", 0, "Seed of the moments.", lower_bound=0)
_IMAGES = flags.DEFINE_integer("rows", 1600, "Images of the data set.", lower_bound=100)
_SCALE = flags.DEFINE_float("scale", 1.0, "Factor of steps and Fisher samples.", lower_bound=0.01)

_SIDE = 32
_COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 60)}
_SHAPES = ("square", "bar", "column", "frame")
# Times and paths, which differ from run to run, and training checkpoints, whose weights are compared in the model.
_UNLIKE = (".lock", "manifest.json", "report.html")
_TIMES = ("created", "examples_per_second")


class Kill(NamedTuple):
    """One kill: which command, how many seconds after it took its workdir, and the stage that it was in."""

    command: str
    seconds: float
    stage: str


def make_images(folder: Path, count: int) -> None:
    """Writes coloured shapes on noise, with captions, as an imagefolder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for row in range(count):
        colour, shape = list(_COLOURS)[rng.integers(4)], _SHAPES[rng.integers(4)]
        pixels = rng.integers(0, 60, (_SIDE, _SIDE, 3), dtype=np.uint8)
        top, left = rng.integers(2, 12, 2)
        height, width = (6 if shape == "bar" else 16), (6 if shape == "column" else 16)
        pixels[top : top + height, left : left + width] = _COLOURS[colour]
        if shape == "frame":
            pixels[top + 4 : top + 12, left + 4 : left + 12] = 0
        Image.fromarray(pixels).save(folder / f"{row:05d}.png")
        lines.append(json.dumps({"file_name": f"{row:05d}.png", "text": f"a {colour} {shape} at {top} {left}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def commands(images: Path, folder: Path) -> dict[str, list[str]]:
    """The chain, by name, writing below `folder`."""

    def scaled(count: int) -> int:
        return max(1, round(count * _SCALE.value))

    data, model = f"--dataset=folder:{images}", f"--model={folder / 'train' / 'model'}"
    train = [data, f"--workdir={folder / 'train'}", "--checkpoint_every=20", "--vae_batch_size=16"]
    train += [f"--vae_steps={scaled(100)}", f"--train_steps={scaled(100)}", "--train_batch_size=32"]
    run = [data, model, f"--workdir={folder / 'run'}"]
    samples = f"--fisher_samples={scaled(8192)}"
    unlearn = ["--prompt=a red frame", f"--steps={scaled(40)}", "--query_draws=128", "--step_size=0.001"]
    score = ["--keep_ewc_gradient", "--damping=1e-8", "--stride=250", "--sampler_steps=10", samples]
    return {
        "train": ["launch.train", *train],
        "encode": ["launch.encode", *run],
        "fisher": ["launch.fisher", *run, samples],
        "attribute": ["launch.attribute", *run, *unlearn, *score],
    }


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts one command and returns when it has taken its workdir, or has ended."""
    (workdir,) = (Path(flag.removeprefix("--workdir=")) for flag in command if flag.startswith("--workdir="))
    with open(log, "ab") as stream:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=stream, stderr=stream)
    while process.poll() is None and not _holds(workdir, process.pid):
        time.sleep(0.02)
    return process


def _holds(workdir: Path, pid: int) -> bool:
    try:
        return json.loads((workdir / ".lock").read_text())["pid"] == pid
    except (FileNotFoundError, ValueError):
        return False


def check_ended(name: str, process: subprocess.Popen, log: Path) -> None:
    """Raises where a command that nobody killed has failed."""
    if process.wait() != 0:
        raise ValueError(f"launch.{name} ended with code {process.returncode}:\n{log.read_text()[-2000:]}")


def open_stage(folder: Path) -> str:
    """The stage that was being written below `folder`: of the unfinished ones, the one opened last."""
    records = [(path.stat().st_mtime_ns, path) for path in folder.rglob("stage.json")]
    unfinished = [path for _, path in sorted(records) if not json.loads(path.read_text())["finished"]]
    if not unfinished:
        return "between stages"
    stage = unfinished[-1].parent
    name = stage.relative_to(folder).parts[1]
    if name == "attribution":
        after = (stage / "losses").exists() or (stage / "unlearned.safetensors").exists()
        return "losses after" if after else "unlearning"
    shown = {"losses": "losses before", "autoencoder": "train autoencoder", "diffusion": "train diffusion"}
    return shown.get(name, name)


def quiet_chain(images: Path, folder: Path, log: Path) -> dict[str, float]:
    """Runs the chain undisturbed -> the seconds for which each command held its workdir."""
    seconds = {}
    for name, command in commands(images, folder).items():
        process = start(command, log)
        began = time.monotonic()
        check_ended(name, process, log)
        seconds[name] = time.monotonic() - began
    return seconds


def killed_chain(
    images: Path, folder: Path, log: Path, seconds: dict[str, float], kills: int, rng: np.random.Generator
) -> list[Kill]:
    """Runs the chain, killing and starting again each command up to `kills` times in all."""
    made = []
    for name, command in commands(images, folder).items():
        while True:
            process = start(command, log)
            if len(made) == kills:
                check_ended(name, process, log)
                break
            moment = rng.uniform(0, seconds[name])
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                made.append(Kill(name, moment, open_stage(folder)))
                print(f"| {name} | {moment:.2f} | {made[-1].stage} |", flush=True)
                continue
            check_ended(name, process, log)
            break
    return made


def differences(folder: Path, expected: Path) -> list[str]:
    """The files that are in one of the folders only, or that differ in a bit of their content."""
    found, wanted = (_files(path) for path in (folder, expected))
    lines = [f"{name}: in one of the two only" for name in sorted(found ^ wanted)]
    return lines + [
        f"{name}: differs" for name in sorted(found & wanted) if _content(folder / name) != _content(expected / name)
    ]


def _files(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.name not in _UNLIKE and not any(part.isdigit() for part in path.parts)}


def _content(path: Path) -> object:
    """What a file holds, without times and without the order of a container."""
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return {name: (stored[name].dtype.str, stored[name].shape, stored[name].tobytes()) for name in stored.files}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 no mapping
            return stored.metadata(), {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in arrays.items()}
    if path.name in ("stage.json", "metrics.jsonl"):
        records = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        return [{k: v for k, v in json.loads(record).items() if k not in _TIMES} for record in records]
    return path.read_bytes()


def main():
    common.require(workdir=common.workdir())
    base = Path(common.workdir())
    if base.exists() and any(base.iterdir()):
        raise ValueError(f"workdir {os.fspath(base)!r} is not empty; give a new one")
    images, whole, log = base / "images", base / "whole", base / "commands.log"
    make_images(images, _IMAGES.value)
    began = time.monotonic()
    # Twice: the first run compiles what the others find compiled.
    quiet_chain(images, base / "first", log)
    seconds = quiet_chain(images, whole, log)
    wrong = differences(base / "first", whole)
    shutil.rmtree(base / "first")
    print("undisturbed: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), flush=True)
    print("| killed | after s | in |\n|---|---|---|", flush=True)
    rng, kills, chains = np.random.default_rng(_SEED.value), [], 0
    while len(kills) < _KILLS.value and not wrong:
        chains += 1
        folder = base / f"killed-{chains}"
        kills += killed_chain(images, folder, log, seconds, _KILLS.value - len(kills), rng)
        wrong = differences(folder, whole)
        if not wrong:
            shutil.rmtree(folder)
    stages = {kill.stage: 0 for kill in kills}
    for kill in kills:
        stages[kill.stage] += 1
    print("kills in each stage: " + ", ".join(f"{stage} {count}" for stage, count in stages.items()))
    print(f"{len(kills)} kills in {chains} chains, {len(_files(whole))} files compared after each", end=", ")
    print(f"{time.monotonic() - began:.0f} s")
    if wrong:
        raise ValueError(f"the results differ, see {base}:\n" + "\n".join(wrong))
    print("every chain ended with the bits of the undisturbed one")


if __name__ == "__main__":
    common.run(main)
