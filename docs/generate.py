"""Writes the pages that are made from the code and from tables: docs/API.md and docs/COMPATIBILITY.md.

python docs/generate.py
"""

import csv
import importlib
import tomllib
from pathlib import Path

import attrib_jax

DOCS = Path(__file__).parent

# Folder of the library -> heading of its public names.
_HEADINGS = {
    "attribute": "The main job",
    "attribution": "Attribution",
    "curvature": "Curvature",
    "diffusion": "Diffusion",
    "models": "Models",
    "convert": "Loading and saving models",
    "data": "Data sets",
    "jobs": "Queries, encoding and runs",
    "methods": "Settings of methods",
    "training": "Training",
    "evaluation": "Evaluation",
    "retrieval": "Retrieval",
    "report": "Reports",
    "storage": "Storage",
    "parallel": "Devices and hosts",
    "ops": "Operations",
    "core": "Keys, batches, weights",
}

_API_HEAD = """# API reference

The public names of `attrib_jax`, by topic; import them from the package (`import attrib_jax as aj`). Latents are (B,
h, w, c), text states (B, L, d), timesteps (S,), images (B, H, W, 3) in [-1, 1] unless stated otherwise; parameters
are plain nested dicts.
"""

_COMPATIBILITY_HEAD = """# Compatibility

What is read, written and tested, and by which tests. Written by `python docs/generate.py` from `docs/compatibility/`;
[Formats](FORMATS.md) says which flags read what. Names of keys come from copies of the published configs and from the
sources of diffusers and transformers; old forms are made by renaming (`tests/convert/old_layout.py`,
`tests/convert/published_configs.py`). Stable Diffusion 2.0-base's scheduler file and the `sample_size` of 1.4's
autoencoder were not found in a copy.
"""

_FULL_SIZE = """## Models at full size

`python -m benchmarks.formats --models=sd14,sd21,mscoco` and `--models=sd21base --formats="folder,single
.safetensors,single .ckpt,folder to single,single to folder"`: random weights (MSCOCO: its UNet with the autoencoder
and text encoder of Stable Diffusion 2), largest error relative to PyTorch's largest value, float32; memory is
anonymous, its peak over the float32 weights. Other jobs were running, so the seconds are upper bounds, loose ones
where they exceed 30. The rows of MSCOCO were measured later than the others.
"""

_TOWERS = """## Feature towers at full size

`python -m benchmarks.towers`, random weights: largest error of the features relative to PyTorch's largest value,
float32 (other jobs were running except for DINOv2, so the seconds are upper bounds):

| tower | weights | images | texts | load |
|---|---|---|---|---|
| CLIP ViT-B/32 | 151.3 M | 1.0e-06 | 8.1e-07 | 103 s |
| DINO ViT-B/16 | 86.4 M | 9.8e-07 | - | 20 s |
| DINOv2 ViT-L/14, registers | 304.4 M | 8.8e-07 | - | 6 s |

"""


def api_page() -> str:
    """A heading for each topic, and under it a directive of mkdocstrings for each public name."""
    topics: dict[str, list[str]] = {topic: [] for topic in _HEADINGS}
    for name in attrib_jax.__all__:
        module = f"attrib_jax.{attrib_jax._HOME[name]}"
        value = getattr(importlib.import_module(module), name)
        # Where it is defined, if another module offers it too; a constant does not say so.
        module, name = getattr(value, "__module__", module), getattr(value, "__name__", name)
        folder = module.split(".")[1]
        if "deprecated" not in module and (entry := f"::: {module}.{name}") not in topics[folder]:
            topics[folder].append(entry)
    sections = [f"## {_HEADINGS[topic]}\n\n" + "\n\n".join(names) for topic, names in topics.items() if names]
    return "\n\n".join([_API_HEAD.rstrip(), *sections]) + "\n"


def compatibility_page() -> str:
    """Tables of docs/compatibility/tested.toml, and the parity tables of full-size models."""
    tested = tomllib.loads((DOCS / "compatibility" / "tested.toml").read_text(encoding="utf-8"))
    parts = [_COMPATIBILITY_HEAD]
    rows = [(row["what"], row["extent"]) for row in tested["versions"]]
    parts.append(
        "## Versions\n\nJAX 0.10 and newer, Python 3.11 and newer. Which JAX pip takes depends on the Python.\n\n"
    )
    parts[-1] += _table(("versions", "tested"), rows)
    columns = ("model", "what is covered", "written too", "tests")
    rows = [
        (row["what"], row["detail"], "yes" if row["written"] else "", _tests(row["tests"])) for row in tested["models"]
    ]
    parts.append("## Models\n\n" + _table(columns, rows))
    for key, title in (("data", "Data sets"), ("results", "Files of results"), ("platforms", "Platforms")):
        rows = [(row["what"], row["detail"], _tests(row["tests"])) for row in tested[key]]
        parts.append(f"## {title}\n\n" + _table((title.lower(), "what is covered", "tests"), rows))
    with (DOCS / "compatibility" / "full_size.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    parts.append(_FULL_SIZE + "\n" + _table(header, rows))
    parts.append(_TOWERS)
    return "\n".join(parts)


def _tests(files: list[str]) -> str:
    return ", ".join(f"`tests/{file}`" for file in files)


def _table(columns, rows) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [" | ".join(columns), "|".join(["---"] * len(columns)), *(" | ".join(row) for row in escaped)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines) + "\n"


PAGES = {"API.md": api_page, "COMPATIBILITY.md": compatibility_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
