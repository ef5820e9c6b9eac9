"""What the page asks of a model and its index: pictures, their attributions, and the reverse question."""

import collections
import dataclasses
import io
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from attrib_jax.core.types import Scores
from attrib_jax.data.images import decode_image, resize_and_crop
from attrib_jax.data.protocol import NO_GROUP, named_groups
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_size
from attrib_jax.jobs.query import PreparedQuery, Query, decode, prepare_query
from attrib_jax.methods import METHODS
from attrib_jax.methods.base import Attribution, MethodConfig, QueryJob
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.report.outputs import report_data
from attrib_jax.report.page import render_report
from attrib_jax.retrieval.index import Index, StudentIndex, check_index
from attrib_jax.retrieval.search import CANDIDATES, SearchConfig, crop

MAX_UPLOAD_BYTES = 8 * 2**20
MAX_UPLOAD_PIXELS = 16 * 10**6
MAX_PROMPT = 500
METHOD_NAMES = {"instant": "Instant", "exact": "Exact (unlearning)", "features": "Plain features"}
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_KEPT_QUERIES = 64


class Ask(NamedTuple):
    """A question of the page.

    Attributes:
      method: key of `METHOD_NAMES`.
      prompt: caption of the picture.
      seed: of a picture that the model draws.
      box: x0, y0, x1, y1 in pixels of the picture; None for all of it.
      upload: content of an image file, in the place of a drawn picture.
    """

    method: str
    prompt: str
    seed: int = 0
    box: tuple[int, int, int, int] | None = None
    upload: bytes | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Scores and the picture that they are of."""

    ask: Ask
    picture: PreparedQuery
    scores: Scores
    config: Any
    seconds: float


class Engine:
    """A run and its index. Methods that compute are for the worker's thread alone."""

    def __init__(
        self, run: Run, index: Index, exact: UnlearnConfig, sampler: Query, model_name: str, model_credit: str | None,
        top_k: int = 24,
    ):  # fmt: skip
        """Checks that the index is of this run.

        Args:
          run: model and data set; hold the lock of its workdir.
          index: see `open_index`.
          exact: config of the exact method.
          sampler: its settings are those of drawn pictures.
          model_name, model_credit: as the report shows them.
          top_k: images of an answer.

        Raises IndexMismatchError where the index does not fit.
        """
        check_index(index, run)
        self.run, self.index, self.exact_config, self.sampler = run, index, exact, sampler
        self.model_name, self.model_credit, self.top_k = model_name, model_credit, top_k
        self.student = index if isinstance(index, StudentIndex) else None
        if self.student is not None:
            _ = self.student.features
        self.position = {int(row): place for place, row in enumerate(run.dataset.row_ids)}
        groups = run.dataset.groups
        self._group_size = collections.Counter([] if groups is None else np.asarray(groups).tolist())
        self._pictures: OrderedDict[tuple[str, int], PreparedQuery] = OrderedDict()
        self._plain: tuple[np.ndarray, np.ndarray] | None = None
        self._lock = threading.Lock()

    @property
    def methods(self) -> dict[str, str]:
        """Methods that can be asked for."""
        names = dict(METHOD_NAMES)
        if self.student is None:
            del names["features"]
        return names

    def warm_up(self) -> None:
        """Compiles what quick answers need."""
        caption = self.run.dataset.captions(0)[0]
        self.answer(Ask("instant", caption))
        if self.student is not None:
            self.reverse(int(self.index.row_ids[0]))

    def picture(self, ask: Ask) -> PreparedQuery:
        """The picture of a question: drawn, or as uploaded, at the size of the model.

        Raises ValueError for an empty prompt without an image, and for a file that is no image or too large.
        """
        if ask.upload is not None:
            height, width = image_size(self.run.pipeline)
            image = resize_and_crop(read_upload(ask.upload), height, width)
            return prepare_query(self.run.pipeline, self.run.predict, Query(prompt=ask.prompt, image=image))
        key = (ask.prompt, ask.seed)
        with self._lock:
            found = self._pictures.get(key)
        if found is None:
            query = dataclasses.replace(self.sampler, prompt=ask.prompt, seed=ask.seed)
            found = prepare_query(self.run.pipeline, self.run.predict, query)
            with self._lock:
                self._pictures[key] = found
                while len(self._pictures) > _KEPT_QUERIES:
                    self._pictures.popitem(last=False)
        return found

    def answer(self, ask: Ask) -> Answer:
        """Scores of the training images; ValueError for a box outside of the picture."""
        picture = self.picture(ask)
        began = time.monotonic()
        boxed = crop(picture, ask.box)
        config: Any
        if ask.method == "exact":
            config = dataclasses.replace(self.exact_config, region=ask.box)
            with tempfile.TemporaryDirectory(prefix="attrib-jax-") as folder:
                job = QueryJob("page", {}, picture, Path(folder))
                ((scores, _),) = METHODS["unlearn"].score(self.run, [job], config)
        else:
            config = SearchConfig(index=str(self.index.folder), region=ask.box)
            if ask.method == "features":
                config = MethodConfig(method="features")
                scores = self._plain_scores(boxed)
            else:
                many = len(self.index.row_ids) > 20 * CANDIDATES
                (scores,) = self.index.search(self.run, [boxed], CANDIDATES if many else None)
        return Answer(ask, picture, scores, config, time.monotonic() - began)

    def reverse(self, row: int) -> list[tuple[str, float, np.ndarray]]:
        """The reverse question, see `StudentIndex.reverse` -> prompt, cosine and picture (H, W, 3) uint8 of each."""
        if self.student is None:
            raise ValueError(
                "an index of stored residuals keeps no queries, so the reverse question has no answer here"
            )
        found = self.student.reverse(row, 8)
        images = decode(self.run.pipeline, np.stack([latents for *_, latents in found]).astype(np.float32))
        return [(prompt, cosine, image) for (prompt, cosine, _), image in zip(found, images)]

    def report(self, answer: Answer) -> str:
        """The report of an answer as one HTML page."""
        ask = answer.ask
        query = dataclasses.replace(self.sampler, prompt=ask.prompt, seed=ask.seed)
        if ask.upload is not None:
            query = Query(prompt=ask.prompt, image=answer.picture.image)
        config = answer.config
        result = Attribution("page", Path(), answer.scores, (), answer.picture, {ask.method: (answer.seconds, False)})
        data = report_data(result, self.run.dataset, query, config, self.model_name, self.model_credit, self.top_k)
        return render_report(data)

    def cards(self, scores: Scores) -> list[dict[str, Any]]:
        """The best images of an answer as JSON values."""
        top, groups, first, cards = scores.top(self.top_k), self.run.dataset.groups, {}, []
        best = float(top.score[0]) if len(top) and top.score[0] > 0 else None
        for rank, (row, score) in enumerate(zip(top.row_id.tolist(), top.score.tolist()), start=1):
            place = self.position[row]
            # A group of one says nothing.
            group = int(groups[place]) if groups is not None and self._group_size[int(groups[place])] > 1 else None
            same = None if group is None else first.setdefault(group, rank)
            cards.append(
                {
                    "rank": rank,
                    "row": row,
                    "score": score,
                    "share": None if best is None else max(0.0, score / best),
                    "caption": self.run.dataset.captions(place)[0],
                    "group": self._group_label(place, group),
                    "variant_of": same if same != rank else None,
                    "mirrored": bool(top.flip is not None and top.flip[rank - 1] == 1),
                }
            )
        return cards

    def _group_label(self, place: int, group: int | None) -> str | None:
        """What stands under an image: the name of its group, where the data set has names, or its near-duplicates'."""
        names = named_groups(self.run.dataset)
        if names is not None and names[place] != NO_GROUP:
            return str(names[place])
        return None if group is None else f"group {group}"

    def _plain_scores(self, query: PreparedQuery) -> Scores:
        assert self.student is not None
        if self._plain is None:
            self._plain = self.student.features.of_dataset(self.run)
        row_ids, features = self._plain
        (asked,) = self.student.features.of_queries([query])
        return Scores(
            row_ids, np.einsum("nf,f->n", features, asked).astype(np.float64) / len(self.student.features.names)
        )


def read_upload(content: bytes) -> np.ndarray:
    """An uploaded image file -> (H, W, 3) uint8.

    Raises ValueError where it is too large in bytes or pixels, damaged, or no PNG, JPEG, WebP, GIF or BMP file.
    """
    if len(content) > MAX_UPLOAD_BYTES:
        raise ValueError(f"the file has {len(content):,} bytes; expected at most {MAX_UPLOAD_BYTES:,}")
    try:
        # Before the pixels are decoded.
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            pixels = opened.width * opened.height
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("the file is no PNG, JPEG, WebP, GIF or BMP image, or a damaged one") from error
    if pixels > MAX_UPLOAD_PIXELS:
        raise ValueError(f"the image has {pixels:,} pixels; expected at most {MAX_UPLOAD_PIXELS:,}")
    try:
        return decode_image(content, "uploaded")
    except (OSError, ValueError) as error:
        raise ValueError("the file is a damaged image") from error


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()
