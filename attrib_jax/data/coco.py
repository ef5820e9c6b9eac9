"""`coco:PATH`: captions in COCO's annotation format, beside the folder of images."""

import json
import os
import re
from pathlib import Path
from typing import Any

from attrib_jax.core.checks import expand_path
from attrib_jax.core.text import read_text
from attrib_jax.data.captions import field_captions, has_caption_field, warn_uncaptioned
from attrib_jax.data.files import ImageFiles, inner_path, warn_listed

# Five of the people who wrote captions are the rule; some images have six or seven.
_MAX_CAPTIONS = 5
_CREDIT = (
    "COCO, Common Objects in Context. Captions: COCO Consortium, CC BY 4.0; images: their Flickr authors, under "
    "Flickr's terms of use"
)
_CREDIT_URL = "https://cocodataset.org/#termsofuse"


def open_coco(path: str | os.PathLike, resolution: int | None = None, split: str | None = None) -> ImageFiles:
    """Opens COCO 2017, or another data set in its format.

    Rows are the images in the order of the json's `images`, as pycocotools lists them and as the published latents
    are taken to have them (not by id, as torchvision's CocoCaptions sorts them); row ids are positions in that order.
    Of more than five captions the first five in the file are kept. Images that the json names and the folder lacks
    stay rows, which cannot be read; a warning counts them.

    Args:
      path: folder with `annotations/captions_<split>.json` and the images in `<split>/` or `images/<split>/`; or
        that json.
      resolution: side in pixels of the square that images are resized and cropped to; None leaves them as they are.
      split: such as `val2017`; if None `train2017`, or the only one that has captions.

    Raises:
      FileNotFoundError: no such folder, annotation file or folder of images.
      ValueError: the json is damaged or does not hold COCO captions, or none of its images exists.
    """
    name, file = f"coco:{path}", _annotation_file(Path(expand_path(path)), split)
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    part = re.sub("^captions_", "", file.stem)
    places = [root / part, root / "images" / part]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{name}: no folder of images; expected {places[0]} or {places[1]}")
    files, captions, fields, official = _read_annotations(file)
    present = set(os.listdir(folder))
    missing = [image for image in files if image not in present and not os.path.isfile(folder / image)]
    if len(missing) == len(files):
        raise ValueError(f"{name}: {file} names {len(files)} images, and none of them exists in {folder}")
    warn_listed(len(files), f"images that {file} names do not exist in {folder}", missing)
    warn_uncaptioned(name, captions, files, fields, f"expected them in the list 'annotations' of {file.name}")
    credit, credit_url = (_CREDIT, _CREDIT_URL) if official else (None, None)
    return ImageFiles(name, folder, files, captions, resolution, credit, credit_url)


def _annotation_file(path: Path, split: str | None) -> Path:
    if path.is_file():
        if split is not None and path.stem != f"captions_{split}":
            raise ValueError(f"split is {split!r}, but {path} was given; give the folder or no split")
        return path
    folder = path / "annotations"
    found = sorted(folder.glob("captions_*.json"))
    wanted = folder / f"captions_{split or 'train2017'}.json"
    if wanted in found:
        return wanted
    if split is None and len(found) == 1:
        return found[0]
    there = ", ".join(file.name for file in found) or "none"
    raise FileNotFoundError(
        f"dataset coco:{path}: no {wanted} (captions_*.json there: {there}); expected COCO's annotations folder; "
        "give the path of one of these files in its place"
    )


def _read_annotations(file: Path) -> tuple[list[str], list[tuple[str, ...]], list[str], bool]:
    """File names and captions in the order of `images`, the names of fields, and whether they are COCO's own."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not valid JSON ({error}); copy it again") from error
    names: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    fields: dict[str, None] = {}
    for position, image in enumerate(_entries(file, content, "images")):
        source = f"{file}, images[{position}]"
        image_id = _field(source, image, "id", int)
        if image_id in names:
            raise ValueError(f"{source}: id {image_id} comes twice")
        names[image_id] = inner_path(_field(source, image, "file_name", str), source)
        captions[image_id] = []
        fields |= dict.fromkeys(f"images/{key}" for key in image)
    if not names:
        raise ValueError(f"{file} has no images")
    unknown = []
    for position, annotation in enumerate(_entries(file, content, "annotations")):
        source = f"{file}, annotations[{position}]"
        image_id = _field(source, annotation, "image_id", int)
        if not has_caption_field(annotation, None):
            raise ValueError(
                f"{source}: caption is absent (fields: {', '.join(annotation)}); expected COCO's caption format, as in "
                "captions_train2017.json"
            )
        texts = field_captions(annotation, None, source)
        if image_id not in captions:
            unknown.append(f"{texts[0]!r} of {image_id}")
        elif any(texts):
            captions[image_id] += texts
        fields |= dict.fromkeys(f"annotations/{key}" for key in annotation)
    warn_listed(len(content["annotations"]), f"captions in {file} are of images that it does not list", unknown)
    kept = [tuple(captions[image_id][:_MAX_CAPTIONS]) or ("",) for image_id in names]
    info = content.get("info")
    official = isinstance(info, dict) and "cocodataset.org" in str(info.get("url"))
    return list(names.values()), kept, list(fields), official


def _entries(file: Path, content: Any, key: str) -> list:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{file} has no list {key!r}; expected COCO captions with 'images' and 'annotations'")
    return entries


def _field(source: str, entry: Any, key: str, kind: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        noun = {int: "a whole number", str: "a text"}[kind]
        raise ValueError(f"{source}: {key} is {value!r}; expected {noun}. Expected COCO's caption format.")
    return value
