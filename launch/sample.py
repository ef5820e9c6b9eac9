"""Draws images from prompts into one PNG sheet.

python -m launch.sample --model=models/openmoji --prompts="red apple,fire engine" --output=sheet.png
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from PIL import Image

from attrib_jax.core.checks import check_range, expand_path
from attrib_jax.jobs.query import Query, decode, generate, prompt_notes
from attrib_jax.models.predictor import predictor
from launch import common
from launch.flags import define_flags, read_config

_PROMPTS = flags.DEFINE_list("prompts", None, "Prompts, separated by commas.")
_OUTPUT = flags.DEFINE_string(
    "output", "samples.png", "PNG file that is written, with one row for each seed and one column for each prompt."
)
_ROWS = flags.DEFINE_integer("rows", 1, "Number of seeds that each prompt is drawn with.", lower_bound=1)
define_flags(Query)
_MAX_SEED = 2**32 - 1


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        common.require(model=common.MODEL.value, prompts=_PROMPTS.value or None)
        settings = read_config(Query, prompt="")
        # Before images are drawn, which takes minutes.
        check_range("seed", settings.seed, 0, _MAX_SEED - _ROWS.value + 1, integer=True)
        output = Path(expand_path(_OUTPUT.value))
        if output.suffix.lower() != ".png" or not output.parent.is_dir() or output.is_dir():
            raise ValueError(f"output is {_OUTPUT.value!r}; expected the name of a .png in a folder that exists")
        pipeline = common.load_model()
        for prompt in _PROMPTS.value:
            prompt_notes(pipeline, prompt)
        prompts = _PROMPTS.value * _ROWS.value
        seeds = [settings.seed + row for row in range(_ROWS.value) for _ in _PROMPTS.value]
        images = decode(pipeline, generate(pipeline, predictor(pipeline.unet), prompts, seeds, settings))
        height, width = images.shape[1:3]
        sheet = Image.new("RGB", (width * len(_PROMPTS.value), height * _ROWS.value), "white")
        for index, image in enumerate(images):
            row, column = divmod(index, len(_PROMPTS.value))
            sheet.paste(Image.fromarray(image), (column * width, row * height))
        sheet.save(output)
        print(f"{settings.sampler.upper()}, {settings.sampler_steps} steps: {output}")


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
