"""Writes a model, a Fisher information or scores in the form that other programs read.

python -m launch.convert --model=models/openmoji --output=openmoji.safetensors
python -m launch.convert --model=base --custom_diffusion=cat/ --output=cat-pipeline --weights_dtype=float16
python -m launch.convert --fisher=runs/openmoji/fisher/cross-attn-kv-16384-seed0 --output=fisher_info.pt
python -m launch.convert --scores=runs/openmoji/attribution/red-heart --dataset=openmoji --output=scores.csv
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.single_file import save_single_file
from attrib_jax.curvature.fisher_files import FISHER_SUFFIXES, read_fisher_file, write_fisher
from attrib_jax.jobs.curvature import fisher_file
from attrib_jax.storage.score_files import SCORE_SUFFIXES, read_scores, write_scores
from launch import common

_SINGLE_FILE = ".safetensors"
# Weight files that are read but not written: a folder of such a name would be a slip.
_READ_ONLY = (".ckpt", ".pt", ".pth", ".bin", ".json")

_FISHER = flags.DEFINE_string(
    "fisher", None, "Fisher information: a file of ours or by PyTorch names, or a stage folder."
)
_SCORES = flags.DEFINE_string(
    "scores",
    None,
    "Scores: the folder of a query, scores.npz, .csv, .parquet or influence.pkl; --dataset adds captions to a table.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "A model's diffusers folder or single .safetensors file (original names); Fisher information: .pt or .safetensors; "
    "scores: .csv, .npz or .parquet.",
)
_DTYPE = flags.DEFINE_enum(
    "weights_dtype", "float32", ["float32", "float16", "bfloat16"], "Dtype of a model's written weights."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace an output that exists.")


def main():
    common.require(output=_OUTPUT.value)
    modes = {"model": common.MODEL.value, "fisher": _FISHER.value, "scores": _SCORES.value}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) != 1:
        flagged = " and ".join(f"--{name}" for name in given)
        raise ValueError(f"{flagged or 'nothing to convert'} given; give one of --model, --fisher and --scores")
    output = Path(_OUTPUT.value)
    print({"model": _model, "fisher": _fisher, "scores": _scores}[given[0]](output))


def _model(output: Path) -> str:
    if output.suffix in _READ_ONLY:
        raise ValueError(f"output is {str(output)!r}; a model is written as a folder or a {_SINGLE_FILE} file")
    single = output.suffix == _SINGLE_FILE
    _check_output(output, folder=not single)
    pipeline = common.load_model()
    if single:
        save_single_file(pipeline, output, jnp.dtype(_DTYPE.value))
    else:
        save_pipeline(pipeline, output, jnp.dtype(_DTYPE.value), overwrite=_OVERWRITE.value)
    return f"{output}: a model of {len(jax.tree.leaves(pipeline.params))} tensors as {_DTYPE.value}, {_size(output)}"


def _fisher(output: Path) -> str:
    _check_suffix(output, FISHER_SUFFIXES)
    _check_output(output)
    count = write_fisher(read_fisher_file(fisher_file(_FISHER.value)), output)
    return f"{output}: {count} tensors as float64, {_size(output)}"


def _scores(output: Path) -> str:
    _check_suffix(output, SCORE_SUFFIXES)
    _check_output(output)
    captions = _captions() if flags.FLAGS["dataset"].present else None
    if captions is not None and output.suffix == ".npz":
        raise ValueError(f"output is {str(output)!r}, which has no captions; leave --dataset away, or write .csv")
    scores = read_scores(_SCORES.value)
    write_scores(scores, output, captions, _record(Path(_SCORES.value)))
    return f"{output}: {len(scores)} scores, {_size(output)}"


def _check_suffix(output: Path, suffixes: tuple[str, ...]) -> None:
    if output.suffix not in suffixes:
        raise ValueError(f"output is {str(output)!r}; expected a name that ends in {', '.join(suffixes)}")


def _check_output(output: Path, folder: bool = False) -> None:
    """Before anything is read: reading a model takes minutes."""
    if output.exists():
        if output.is_dir() != folder:
            raise FileExistsError(
                f"{output} exists and is {'no folder' if folder else 'a folder'}; name another output"
            )
        if not _OVERWRITE.value:
            raise FileExistsError(f"{output} exists; give --overwrite to replace it, or name another output")
    elif not folder and not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: the folder {output.parent} does not exist; make it first")


def _captions() -> Callable[[int], str]:
    dataset = common.load_dataset()
    position = {int(row): index for index, row in enumerate(dataset.row_ids)}

    def caption(row: int) -> str:
        if row not in position:
            raise ValueError(f"row {row} of --scores is not in --dataset {dataset.name!r}; give the data set scored")
        return dataset.captions(position[row])[0]

    return caption


def _record(scores: Path) -> dict:
    """What an attribution's manifest says about its scores, to travel with them."""
    if scores.name == "scores.npz":
        scores = scores.parent
    manifest = scores / "manifest.json"
    if not manifest.is_file():
        return {"source": scores.name}
    content = json.loads(manifest.read_text(encoding="utf-8"))
    settings = content.get("settings", {})
    return {"source": scores.name, "method": settings.get("method"), "query": settings.get("query")}


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else (path,)
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.2f} MB"


if __name__ == "__main__":
    common.run(main, one_host=True)
