"""Every model format at full size, with random weights: errors against PyTorch, load times, peak memory.

    python -m benchmarks.formats --output=runs/formats --models=sd14            # one model: half an hour on two cores
    python -m benchmarks.formats --output=runs/formats --scale=small            # all models, shrunken

Builds each model in PyTorch, saves it in each format with PyTorch's own writers, loads it here in a fresh process and
compares UNet, autoencoder and text encoder outputs; then converts both ways and compares the tensors to the bit.
Memory is the most that loading holds in anonymous pages (see format_worker.py) over the float32 weights. Files are in
the page cache when they are read, as they have just been written. One process runs at a time, holding one model.

Writes results.md and rows/*.json to --output; a finished row is not run again. Weights lie in --output/files while they
are needed: at most 17 GB at full size. Exits with 1 if a row misses a limit.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from attrib_jax.convert.load import ModelSource
from attrib_jax.core.checks import check_choice
from attrib_jax.parallel.compilation_cache import enable_compilation_cache
from attrib_jax.storage.files import write_json
from benchmarks import format_worker, torch_formats, torch_models
from launch import common

_MODELS = flags.DEFINE_list("models", list(torch_models.MODELS), "Models to build.")
_FORMATS = flags.DEFINE_list("formats", None, "Rows to run; all that fit the model if not given.")
_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Real widths, or shrunken ones.")
_OUTPUT = flags.DEFINE_string(
    "output", "runs/formats", "Folder of the results, and of the weights while they are needed."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Pixels of the autoencoder's input; 256 at full size if not given."
)

ERROR_LIMIT = 1e-4
# Of the peak over the float32 weights. Reading and writing holds the weights once and a tensor on its way.
MEMORY_LIMIT = 1.3


@dataclasses.dataclass(frozen=True)
class Format:
    """One way in.

    Attributes:
      write: (base folder or single file, target folder, Spec, ...) -> files under the target; None for the base itself.
      source: (base, target, Spec) -> what `measure_loading` takes.
      reference: the outputs to compare with, in references/; `write` gets their path as well where it makes them.
      from_single: whether `write` starts from our single file.
    """

    write: Callable[..., None] | None
    source: Callable[[Path, Path, torch_models.Spec], Any]
    reference: str = "float32"
    from_single: bool = False


def _folder(base, target, model):
    return ModelSource(str(target))


def _prediction(model):
    # Stable Diffusion 1 files need no hint; for 2 a safetensors file does not tell, a `.ckpt` does.
    return None if model.name == "sd14" else model.scheduler.get("prediction_type", "epsilon")


def _base(base, target, model):
    return ModelSource(str(base))


def _single(base, target, model):
    return ModelSource(str(base.parent / "single.safetensors"), tokenizer=str(base), prediction_type=_prediction(model))


def _bare_unet(kind: str, sharded: bool = False) -> Format:
    name = f"model.{kind}" + ".index.json" * sharded
    return Format(
        functools.partial(torch_formats.write_bare_unet, kind=kind, sharded=sharded),
        lambda base, target, model: (str(target / name), str(base / "unet" / "config.json")),
    )


FORMATS = {
    "folder": Format(None, _base),
    "folder sharded": Format(functools.partial(torch_formats.write_folder, sharded=True), _folder),
    "folder fp16 variant": Format(
        functools.partial(torch_formats.write_folder, half=True),
        lambda base, target, model: ModelSource(str(target), variant="fp16"),
        "float16",
    ),
    "folder .bin": Format(torch_formats.write_bin_folder, _folder),
    "folder .bin sharded": Format(functools.partial(torch_formats.write_bin_folder, sharded=True), _folder),
    "folder old layout": Format(torch_formats.write_old_folder, _folder),
    "single .safetensors": Format(None, _single, from_single=True),
    "single .ckpt": Format(
        torch_formats.write_checkpoint,
        lambda base, target, model: ModelSource(str(target / "model.ckpt"), tokenizer=str(base)),
        from_single=True,
    ),
    "bare UNet .bin": _bare_unet("bin"),
    "bare UNet .safetensors": _bare_unet("safetensors"),
    "bare UNet .bin sharded": _bare_unet("bin", sharded=True),
    "bare UNet .safetensors sharded": _bare_unet("safetensors", sharded=True),
    "bare UNet + SD 2 folder": Format(
        torch_formats.write_unet_and_base,
        lambda base, target, model: ModelSource(
            str(target / "base"),
            unet=str(target / "model.bin"),
            unet_config="mscoco" if model.scale == "full" else str(target / "unet.json"),
        ),
    ),
    "Custom Diffusion": Format(
        torch_formats.write_custom_diffusion,
        lambda base, target, model: ModelSource(str(base), custom_diffusion=str(target)),
        "custom",
    ),
    "LoRA": Format(
        torch_formats.write_lora,
        lambda base, target, model: ModelSource(str(base), lora=(str(target),), lora_scale=(torch_formats.LORA_SCALE,)),
        "lora",
    ),
}
# name -> (source, name of the target, the check of its tensors)
CONVERSIONS = {
    "folder to single": (_base, "single.safetensors", torch_formats.same_single_file),
    "single to folder": (_single, "converted", torch_formats.same_folder),
    "folder to folder": (_base, "converted", torch_formats.same_folder),
}


def rows_of(model: str) -> list[str]:
    """The rows that fit a model."""
    if model == "mscoco":
        # A single file tells neither linear betas nor a text encoder of version 2 beside a UNet of version 1.
        unfit = {"single .safetensors", "single .ckpt", "folder to single", "single to folder"}
    else:
        unfit = {"bare UNet + SD 2 folder", "folder to folder"}
    return [name for name in [*FORMATS, *CONVERSIONS] if name not in unfit]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The rows of one model.

    Attributes:
      model: what is built.
      output: folder of results, references and, for a while, weights.
      call: runs a function on its arguments, in a fresh process or right here.
    """

    model: torch_models.Spec
    output: Path
    call: Callable[..., Any]

    @property
    def files(self) -> Path:
        return self.output / "files" / self.model.name

    @property
    def base(self) -> Path:
        return self.files / "base"

    @property
    def single(self) -> Path:
        return self.files / "single.safetensors"

    def reference(self, name: str) -> Path:
        return self.output / "references" / self.model.name / f"{name}.npz"

    def run(self, names: list[str]) -> list[dict[str, Any]]:
        """Runs the rows that are not finished, deletes the weights and returns all rows."""
        rows = []
        try:
            for name in names:
                file = self.output / "rows" / f"{self.model.name} {name}.json".replace(" ", "-")
                row = json.loads(file.read_text()) if file.exists() else {"failed": "not run"}
                if "failed" in row:
                    print(f"{self.model.name}: {name}", flush=True)
                    row = {"model": self.model.name, "row": name, **self._try(name)}
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(file, row)
                rows.append(row)
        finally:
            shutil.rmtree(self.files, ignore_errors=True)
        return rows

    def _try(self, name: str) -> dict[str, Any]:
        # A killed run may have left one.
        shutil.rmtree(self.files / "target", ignore_errors=True)
        try:
            return self._convert(name) if name in CONVERSIONS else self._load(name)
        except Exception as error:  # whatever breaks one format, the others are worth their time
            return {"failed": f"{type(error).__name__}: {error}"}
        finally:
            shutil.rmtree(self.files / "target", ignore_errors=True)

    def _load(self, name: str) -> dict[str, Any]:
        form, target = FORMATS[name], self.files / "target"
        self._build_base()
        if form.from_single:
            self._build_single()
        if form.write is not None:
            own = [self.reference(form.reference)] if form.reference in ("custom", "lora") else []
            self.call(form.write, self.single if form.from_single else self.base, target, self.model, *own)
        source = form.source(self.base, target, self.model)
        return self.call(format_worker.measure_loading, source, self.reference(form.reference))

    def _convert(self, name: str) -> dict[str, Any]:
        source, filename, check = CONVERSIONS[name]
        target = self.files / "target" / filename
        self._build_base()
        if name == "single to folder":
            self._build_single()
        target.parent.mkdir(parents=True)
        source = source(self.base, target, self.model)
        row = self.call(format_worker.measure_conversion, source, target)
        return row | {"equal_tensors": self.call(check, self.base, target)}

    def _build_base(self) -> None:
        if not self.base.exists():
            partial = self.files / "base.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self.call(torch_models.build, self.model, partial, self.reference("float32").parent)
            partial.rename(self.base)

    def _build_single(self) -> None:
        if not self.single.exists():
            source = ModelSource(str(self.base))
            self.call(format_worker.measure_conversion, source, self.single)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new interpreter, which keeps the programs that it compiles for the next one."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=enable_compilation_cache) as pool:
        return pool.submit(function, *arguments).result()


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, for tests, to which a peak of memory means nothing."""
    return function(*arguments)


def misses(row: dict[str, Any], scale: str) -> list[str]:
    """What a row misses of the limits; memory counts at full size only."""
    if "failed" in row:
        return [row["failed"]]
    found = [f"other {name}" for name in row.get("differing", [])]
    found += [f"error of {part}" for part, error in row.get("errors", {}).items() if not error <= ERROR_LIMIT]
    return found + (["memory"] if scale == "full" and row["peak"] > MEMORY_LIMIT * row["weights"] else [])


def table(rows: list[dict[str, Any]], scale: str) -> str:
    """The rows as two markdown tables: formats that were loaded, conversions."""
    heads = ["model", "format", "UNet", "VAE", "text encoder", "load, s", "weights, GB", "peak / weights", "misses"]
    lines = {name: [heads] for name in ("loading",)}
    lines["conversion"] = [["model", "conversion", "equal tensors", *heads[5:]]]
    for row in rows:
        is_load = row["row"] in FORMATS
        if "failed" in row:
            cells = [""] * (6 if is_load else 4)
        else:
            errors = row.get("errors", {})
            cells = [f"{errors[part]:.1e}" if part in errors else "" for part in torch_models.PARTS] if is_load else []
            cells += [] if is_load else [f"{row['equal_tensors']}"]
            weights, ratio = row["weights"], row["peak"] / row["weights"]
            cells += [f"{row['seconds']:.1f}", f"{weights / 1e9:.2f}", f"{ratio:.2f}"]
        missed = "; ".join(misses(row, scale)).replace("\n", " ").replace("|", "/")
        lines["loading" if is_load else "conversion"].append([row["model"], row["row"], *cells, missed])
    return "\n\n".join(
        "\n".join(f"| {' | '.join(cells)} |" for cells in [table[0], ["---"] * len(table[0]), *table[1:]])
        for table in lines.values()
    )


def main():
    output, scale, rows = Path(_OUTPUT.value), _SCALE.value, []
    for name in _FORMATS.value or ():
        check_choice("formats", name, [*FORMATS, *CONVERSIONS])
    for name in _MODELS.value:
        check_choice("models", name, torch_models.MODELS)
        names = [row for row in rows_of(name) if _FORMATS.value is None or row in _FORMATS.value]
        model = torch_models.spec(name, scale, _IMAGE_SIZE.value)
        rows += Benchmark(model, output, in_fresh_process).run(names)
        (output / "results.md").write_text(table(rows, scale) + "\n")
    print(table(rows, scale))
    missing = sum(bool(misses(row, scale)) for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} rows miss a limit")


if __name__ == "__main__":
    common.run(main)
