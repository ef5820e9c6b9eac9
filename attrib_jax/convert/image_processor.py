"""What a transformers image processor does to an image before a vision tower: resize, crop, normalise.

Pillow does the resizing, as in transformers' PIL processors, whose pixels these are (tested). Kept by hand because
importing those takes each reading process seconds, and because they normalise on the host, before the transfer.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from attrib_jax.convert.config_files import check_values, read_json, write_json
from attrib_jax.core.checks import check_choice

FILE = "preprocessor_config.json"
_NESTED_FILE = "processor_config.json"  # of a folder that a transformers processor wrote
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
# Defaults by the class's name without "ImageProcessor", "FeatureExtractor" and "Fast"; as transformers has them.
_CLASSES: dict[str, dict[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3, "mean": _CLIP_MEAN, "std": _CLIP_STD},
    "ViT": {"size": {"height": 224, "width": 224}, "crop_size": None, "resample": 2, "mean": _HALF, "std": _HALF},
}
_CLASSES["Bit"] = _CLASSES["CLIP"]


_SIZE = int | dict
_OPTIONS: dict[str, Any] = {
    "image_processor_type": str | None,
    "feature_extractor_type": str | None,
    "do_resize": bool,
    "do_rescale": bool,
    "do_normalize": bool,
    "do_center_crop": bool,
    "rescale_factor": float,
    "size": _SIZE,
    "crop_size": _SIZE | None,
    "resample": int,
    "image_mean": tuple[float, float, float],
    "image_std": tuple[float, float, float],
}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Images of any size -> normalised square ones.

    Attributes:
      resize: the length of the shorter side, or of both sides where `square`; None leaves the size.
      square: resize both sides, whatever the image's shape.
      crop: side of the square that is cut out of the centre; None where `square` makes it one.
      resample: Pillow's number of the filter: 2 bilinear, 3 bicubic.
      mean, std: of each channel of [0, 1].
    """

    resize: int
    square: bool = False
    crop: int | None = None
    resample: int = 3
    mean: tuple[float, float, float] = _HALF
    std: tuple[float, float, float] = _HALF

    def __post_init__(self):
        if not self.square and (self.crop is None or self.crop > self.resize):
            raise ValueError(
                f"image processor resizes the shorter side to {self.resize} and crops to {self.crop}; expected a crop "
                "of at most that size, so that images become squares without a border"
            )
        if min(self.std) <= 0:
            raise ValueError(f"image processor has image_std={self.std}; expected numbers greater than 0")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = FILE) -> "ImageProcessor":
        """Reads a preprocessor_config.json of a CLIP, ViT or Bit processor, of any age.

        Raises ValueError for another class, a step that is switched off, or sizes that are no squares.
        """
        check_values(config, _OPTIONS, source)
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
        for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
            kind = kind.removesuffix(ending)
        check_choice("image_processor_type", kind, _CLASSES)
        defaults = _CLASSES[kind]
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise ValueError(
                    f"{FILE} has {step}=false; only processors that resize, rescale and normalise are read"
                )
        factor = config.get("rescale_factor", 1 / 255)
        if abs(factor * 255 - 1) > 1e-6:
            raise ValueError(f"{FILE} has rescale_factor={factor!r}; supported: 1/255")
        size = config.get("size", defaults["size"])
        if isinstance(size, int):
            size = {"shortest_edge": size} if "shortest_edge" in defaults["size"] else {"height": size, "width": size}
        check_values(size, {"shortest_edge": int}, f"{source}: size")
        square = "shortest_edge" not in size
        crops = config.get("do_center_crop", defaults["crop_size"] is not None)
        return cls(
            resize=_side("size", size) if square else size["shortest_edge"],
            square=square,
            crop=_side("crop_size", config.get("crop_size", defaults["crop_size"])) if crops else None,
            resample=int(config.get("resample", defaults["resample"])),
            mean=tuple(config.get("image_mean", defaults["mean"])),
            std=tuple(config.get("image_std", defaults["std"])),
        )

    def to_dict(self) -> dict[str, Any]:
        """The preprocessor_config.json of a transformers CLIPImageProcessor that does the same."""
        size = {"height": self.resize, "width": self.resize} if self.square else {"shortest_edge": self.resize}
        side = self.side
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    @property
    def side(self) -> int:
        """Height and width of what comes out."""
        return self.resize if self.crop is None else self.crop

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Resizes and crops (H, W, 3) uint8 -> (side, side, 3) uint8."""
        height, width = image.shape[:2]
        if self.square:
            new = (self.resize, self.resize)
        else:
            # As transformers computes it: the longer side rounded down.
            short, long = min(height, width), max(height, width)
            longer = int(self.resize * long / short)
            new = (longer, self.resize) if height > width else (self.resize, longer)
        if new != (height, width):
            image = np.asarray(Image.fromarray(image).resize((new[1], new[0]), Image.Resampling(self.resample)))
        if self.crop is None:
            return image
        top, left = (new[0] - self.crop) // 2, (new[1] - self.crop) // 2
        return image[top : top + self.crop, left : left + self.crop]

    def normalise(self, images: Any) -> Any:
        """(..., 3) uint8, numpy's or JAX's -> float32 in units of `std` around `mean`."""
        scaled = images.astype(np.float32) * np.float32(1 / 255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _side(name: str, size: Any) -> int:
    if isinstance(size, int):
        return size
    is_square = isinstance(size, Mapping) and size.keys() == {"height", "width"} and size["height"] == size["width"]
    if not is_square or type(size["height"]) is not int or size["height"] < 1:
        raise ValueError(f"{FILE} has {name}={size!r}; expected a square, as one number or as height and width")
    return size["height"]


def load_image_processor(folder: str) -> ImageProcessor:
    """Reads preprocessor_config.json, or the image processor of processor_config.json.

    Raises FileNotFoundError where the folder has neither, ValueError as `ImageProcessor.from_dict`.
    """
    file, nested = (os.path.join(folder, name) for name in (FILE, _NESTED_FILE))
    if os.path.isfile(file):
        return ImageProcessor.from_dict(read_json(file), file)
    inner = read_json(nested).get("image_processor") if os.path.isfile(nested) else None
    if not isinstance(inner, dict):
        raise FileNotFoundError(f"{folder!r} has no {FILE}; copy it from where the tower's weights come from")
    return ImageProcessor.from_dict(inner, nested)


def save_image_processor(processor: ImageProcessor, folder: str) -> None:
    """Writes the preprocessor_config.json."""
    write_json(processor.to_dict(), os.path.join(folder, FILE))
