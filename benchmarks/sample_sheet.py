"""Draws random training captions and lays the images beside the training images: docs/samples.png.

python -m benchmarks.sample_sheet --model=models/openmoji --output=docs/samples.png
"""

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.sources import open_dataset
from attrib_jax.jobs.query import Query, decode, generate
from attrib_jax.models.predictor import predictor
from launch import common

_OUTPUT = flags.DEFINE_string("output", "docs/samples.png", "PNG file that is written.")
_COUNT = flags.DEFINE_integer("count", 60, "Random captions to draw.", lower_bound=1)
_COLUMNS = flags.DEFINE_integer("columns", 10, "Pairs in a row.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of captions, and of the images.", lower_bound=0)
_GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "Weight of classifier-free guidance.")
_CAPTION_HEIGHT = 26


def main():
    common.require(model=common.MODEL.value)
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    rows = np.random.default_rng(_SEED.value).choice(len(dataset), _COUNT.value, replace=False)
    captions = [dataset.captions(row)[0] for row in rows]
    settings = Query(prompt="", guidance_scale=_GUIDANCE.value)
    seeds = [_SEED.value + index for index in range(len(rows))]
    images = decode(pipeline, generate(pipeline, predictor(pipeline.unet), captions, seeds, settings))
    size = images.shape[1]
    width, height = 2 * size + 8, size + _CAPTION_HEIGHT
    lines = -(-len(rows) // _COLUMNS.value)
    sheet = Image.new("RGB", (width * _COLUMNS.value, height * lines), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, image, caption) in enumerate(zip(rows, images, captions)):
        x, y = width * (index % _COLUMNS.value), height * (index // _COLUMNS.value)
        sheet.paste(Image.fromarray(dataset[row].image), (x, y))
        sheet.paste(Image.fromarray(image), (x + size, y))
        words, line = caption.split(), ""
        wrapped = []
        for word in words:
            if len(line) + len(word) > 21:
                wrapped.append(line)
                line = ""
            line = f"{line} {word}".strip()
        draw.multiline_text((x + 2, y + size), "\n".join([*wrapped, line][:2]), fill="black", spacing=0)
    sheet.save(_OUTPUT.value)
    print(f"left the training image, right the model's: {_OUTPUT.value}")


if __name__ == "__main__":
    common.run(main)
