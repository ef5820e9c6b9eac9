"""`tfds:NAME[:SPLIT]`: any TensorFlow Datasets data set that is prepared for random access; TensorFlow is not used."""

import contextlib
import difflib
import logging
import os
import re
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.core.checks import expand_path
from attrib_jax.core.text import decode_text
from attrib_jax.data.captions import CAPTION_FIELDS, normal_name
from attrib_jax.data.images import decode_image, fit_image
from attrib_jax.data.protocol import FilePart, Row, hash_files

_FORMAT = "array_record"
# Which of several texts is the caption; the first names are the surer ones.
_CAPTION_NAMES = ("captions/text", "captions", "caption", *CAPTION_FIELDS)
_LABEL_NAMES = ("label",)
# How the names of texts end that say which image it is, not what it shows.
_IDENTIFIER = re.compile(r"(^|[/_-])(file_?name|(file)?path|url|uri|id)$", re.IGNORECASE)


class _Feature(NamedTuple):
    """A feature by the keys that lead to it, and how to turn class numbers into names, or None for a text."""

    keys: tuple[str, ...]
    class_name: Any = None

    @property
    def name(self) -> str:
        return "/".join(self.keys)


class TfdsDataset:
    """One split of a prepared TFDS data set; row ids are positions in the split.

    Attributes, beside those of a `Dataset`:
      fields: names of its features, those within others with '/'.
    """

    groups = group_names = credit_url = None

    def __init__(
        self,
        name: str,
        data_dir: str | os.PathLike | None = None,
        resolution: int | None = None,
        split: str | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
    ):
        """Opens a data set that was prepared with `file_format="array_record"`.

        Args:
          name: such as `coco_captions` (which is COCO 2014), `my_data/config:1.0.0`, or with the split behind it,
            `coco_captions:val`.
          data_dir: folder of prepared data sets; TFDS's own default if None.
          resolution: side in pixels of the square that images are resized and cropped to; None leaves them as they are.
          split: name of the split, also in TFDS's slicing syntax, `train[:1000]`; `train`, or the only one, if None.
          image_key: the image feature; the only one if None.
          caption_key: a text, a sequence of texts, or a class label, whose names are the captions; a row without a
            label (-1) has an empty one. Features within others are named with '/', as in `captions/text`. If None: the
            only text, or the one with a usual name, where texts named as file names, paths, addresses and ids do not
            count; without any text the only class label, or `label`.

        Raises:
          FileNotFoundError: it is not prepared in `data_dir`.
          ValueError: it is prepared in a format without random access, or there is no such split or feature, or more
            than one that it could be.
        """
        self.name = f"tfds:{name}"
        name, split = split_name(name, split)
        builder = _find_builder(name, data_dir)
        splits = list(builder.info.splits)
        if split is None and "train" not in splits and len(splits) != 1:
            raise ValueError(f"{self.name} has no split 'train', but {', '.join(splits)}; name one of these")
        self._split = split or ("train" if "train" in splits else splits[0])
        self._builder_dir, self._resolution = os.fspath(builder.data_dir), resolution
        self._image_key, self._caption_key = image_key, caption_key
        with quiet_tfds():
            self._open(builder)
        self.row_ids = np.arange(len(self._records), dtype=np.int32)
        license_text = builder.info.redistribution_info.license
        self.credit = f"{builder.info.name}: {license_text}" if license_text else None

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        self._ensure_open()
        record = self._records[int(self.row_ids[index])]
        content = self._parse(record, self._image, skip_decoding=True)
        image = decode_image(content, f"row {index} of {self.name}")
        fitted = fit_image(image, self._resolution)
        return Row(fitted, self._parse_captions(record), int(self.row_ids[index]), image.shape[:2])

    def captions(self, index: int) -> tuple[str, ...]:
        self._ensure_open()
        return self._parse_captions(self._records[int(self.row_ids[index])])

    def fingerprint(self) -> str:
        """sha256 over version, split, feature names, and size and ends of the split's files; see `hash_files`.

        Captions lie in the same records as images, so that hashing each of them would be reading everything.
        """
        from tensorflow_datasets.core.read_only_builder import builder_from_directory

        self._ensure_open()
        info = builder_from_directory(self._builder_dir).info
        files = info.splits[self._split].file_instructions
        described = [self._resolution, info.full_name, self._split, self._image.name, self._caption.name]
        described += [(os.path.basename(file.filename), file.skip, file.take) for file in files]
        return hash_files(described, [FilePart(os.fspath(file.filename)) for file in files], images=False)

    def __getstate__(self) -> dict:
        opened = ("_records", "_features", "_image", "_caption")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def _ensure_open(self) -> None:
        if "_records" not in self.__dict__:
            from tensorflow_datasets.core.read_only_builder import builder_from_directory

            with quiet_tfds():
                self._open(builder_from_directory(self._builder_dir))

    def _open(self, builder: Any) -> None:
        import tensorflow_datasets as tfds

        self._features = builder.info.features
        self.fields = tuple("/".join(keys) for keys, _ in _flatten(self._features, sequences=True))
        self._image = _choose_image(self.name, self._features, self._image_key)
        self._caption = _choose_caption(self.name, self._features, self._caption_key)
        try:
            builder.info.splits[self._split]
        except ValueError as error:
            raise ValueError(f"{self.name}: split is {self._split!r}; {error}") from error
        formats = sorted(form.value for form in builder.info.available_file_formats())
        if _FORMAT not in formats:
            raise ValueError(
                f"{self.name} is prepared in {self._builder_dir} as {', '.join(formats)}, without random access; "
                f"expected {_FORMAT}. Convert it with `tfds convert_format --dataset_version_dir={self._builder_dir} "
                f"--out_file_format={_FORMAT}`, or prepare it in another --data_dir with file_format={_FORMAT!r}."
            )
        # Last, because it marks the data set as open for other threads.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(self._split, deserialize_method=raw, file_format=_FORMAT)

    def _parse(self, record: bytes, feature: _Feature, skip_decoding: bool = False) -> Any:
        """One feature of a stored record, without decoding the others."""
        import tensorflow_datasets as tfds

        top = feature.keys[0]
        decoders: Any = tfds.decode.SkipDecoding() if skip_decoding else None
        for key in reversed(feature.keys):
            decoders = {key: decoders}
        features = tfds.features.FeaturesDict({top: self._features[top]})
        value = features.deserialize_example_np(record, decoders=decoders if skip_decoding else None)
        for key in feature.keys:
            value = value[key]
        return value

    def _parse_captions(self, record: bytes) -> tuple[str, ...]:
        values = np.ravel(np.asarray(self._parse(record, self._caption), object))
        if self._caption.class_name is not None:
            # TFDS stores "unlabelled" as -1, whose name would be the last class's.
            return tuple(self._caption.class_name(int(value)) for value in values if value >= 0) or ("",)
        return tuple(decode_text(value).text for value in values) or ("",)


def split_name(name: str, split: str | None = None) -> tuple[str, str | None]:
    """'coco_captions:1.0.0:train[:10]' -> ('coco_captions:1.0.0', 'train[:10]'); ValueError for two unlike splits."""
    parts = re.fullmatch(r"([^:]+(?::[\d*]+\.[\d*]+\.[\d*]+)?)(?::(.+))?", name)
    if parts is None:
        raise ValueError(f"dataset tfds:{name}: expected tfds:NAME or tfds:NAME:SPLIT")
    if parts[2] and split and parts[2] != split:
        raise ValueError(f"split is {split!r}, but the data set's name says {parts[2]!r}; give one of them")
    return parts[1], parts[2] or split


@contextlib.contextmanager
def quiet_tfds():
    """TFDS logs a dozen lines and, through absl, a warning about OpenCV for each use; only errors concern a user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _find_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """The prepared data set, from its files alone: the code that made it need not be installed."""
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    data_dir = expand_path(data_dir or constants.DATA_DIR)
    try:
        with quiet_tfds():
            return builder_from_files(name, data_dir=data_dir)
    except DatasetNotFoundError as error:
        base = re.split("[/:]", name)[0]
        prepared = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
        near = difflib.get_close_matches(base, [folder for folder in prepared if folder != base], n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(
            f"TFDS data set {name!r} is not prepared in {data_dir}. {hint}Prepare it there with `tfds build {base} "
            f"--file_format={_FORMAT} --data_dir={data_dir}`, or from Python with tfds.builder({base!r}, "
            f"file_format={_FORMAT!r}).download_and_prepare()."
        ) from error


def _choose_image(name: str, features: Any, key: str | None) -> _Feature:
    import tensorflow_datasets as tfds

    images = {}
    for keys, feature in _flatten(features):
        if isinstance(feature, tfds.features.Image):
            images["/".join(keys)] = _Feature(keys)
    chosen = _choose(name, features, "image", images, key, ("image",))
    feature = features
    for part in chosen.keys:
        feature = feature[part]
    if np.issubdtype(feature.np_dtype, np.floating):
        raise ValueError(f"{name}: image {chosen.name!r} has {feature.np_dtype} values; expected integers")
    return chosen


def _choose_caption(name: str, features: Any, key: str | None) -> _Feature:
    import tensorflow_datasets as tfds

    texts, labels = {}, {}
    for keys, feature in _flatten(features, sequences=True):
        if isinstance(feature, tfds.features.ClassLabel):
            if feature.names:
                labels["/".join(keys)] = _Feature(keys, feature.int2str)
        # Of exactly this kind: images and files are kept as bytes too.
        elif type(feature) in (tfds.features.Text, tfds.features.Tensor) and feature.np_dtype == np.object_:
            texts["/".join(keys)] = _Feature(keys)
    if key is not None:
        return _choose(name, features, "caption", texts | labels, key, ())
    texts = {text: feature for text, feature in texts.items() if not _IDENTIFIER.search(text)}
    return _choose(name, features, "caption", texts or labels, None, _CAPTION_NAMES if texts else _LABEL_NAMES)


def _choose(name, features, what: str, candidates: dict[str, _Feature], key: str | None, usual) -> _Feature:
    if key is None:
        named = {normal_name(candidate): candidate for candidate in reversed(candidates)}
        usual = [named[name] for name in usual if name in named]
        if not usual and len(candidates) == 1:
            usual = list(candidates)
        key = usual[0] if usual else None
    if key not in candidates:
        found = f"no {what} feature" if not candidates else f"several features that could be the {what}"
        if key is not None:
            found = f"no {what} feature {key!r}"
        listed = ", ".join(sorted(candidates)) or f"none; all features: {', '.join(sorted(features))}"
        raise ValueError(f"{name} has {found} (there are: {listed}); name one as {what}_key")
    return candidates[key]


def _flatten(features: Any, sequences: bool = False, keys: tuple[str, ...] = ()):
    """(keys, feature) of all leaves of nested dicts, and also within sequences if `sequences`."""
    import tensorflow_datasets as tfds

    for key, feature in features.items():
        if sequences and isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flatten(feature, sequences, (*keys, key))
        else:
            yield (*keys, key), feature
