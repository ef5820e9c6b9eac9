"""The page as a browser would read it: parsed, its images decoded, nothing loaded from elsewhere."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from attrib_jax.report import Region, ReportData, Timing, write_report
from attrib_jax.report.page import render_report
from attrib_jax.storage.files import StorageError
from tests.report.conftest import image_of

_VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes and the text inside each; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {[tag for tag, _, _ in self.open]}"

    def handle_starttag(self, tag, attrs):
        entry = (tag, dict(attrs), [])
        self.tags.append(entry)
        if tag not in _VOID:
            self.open.append(entry)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        opened, _, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def find(self, tag: str, cls: str | None = None) -> list[tuple[dict, str]]:
        """(attributes, text) of each `tag`, of class `cls` if given, in document order."""
        return [
            (attrs, " ".join("".join(text).split()))
            for name, attrs, text in self.tags
            if name == tag and (cls is None or cls in attrs.get("class", "").split())
        ]


def read(report: ReportData) -> Page:
    return Page(render_report(report))


def decode(uri: str) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(prefix), validate=True))))


def test_cards_are_in_order_with_the_right_images(make_report):
    report = make_report()
    page = read(report)
    cards = page.find("li", "card")
    assert [text for _, text in page.find("span", "rank")] == ["1", "2", "3", "4", "5"]
    assert [text for _, text in page.find("div", "score")] == [
        f"{number} ×10⁻⁵" for number in ("8.00", "4.00", "2.00", "1.00", "−3.00")
    ]
    assert [text for _, text in page.find("div", "caption")] == [f"image {row}" for row in (14, 12, 10, 13, 11)]
    assert ["mirrored" in text for _, text in cards] == [True, True, False, False, False]
    images = [attrs for attrs, _ in page.find("img")]
    np.testing.assert_array_equal(decode(images[0]["src"]), report.query_image)
    for attrs, (row, mirrored) in zip(images[1:], [(14, 1), (12, 1), (10, 0), (13, 0), (11, 0)], strict=True):
        image = report.image(row)
        np.testing.assert_array_equal(decode(attrs["src"]), image[:, ::-1] if mirrored else image)
        assert f"image {row}" in attrs["alt"] and ("mirrored" in attrs["alt"]) == bool(mirrored)


def test_nothing_is_loaded_from_elsewhere(make_report):
    text = render_report(make_report())
    page = Page(text)
    for tag, attrs, _ in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            if name in attrs and not attrs[name].startswith(("data:image/png;base64,", "#")):
                assert tag == "a", f"<{tag} {name}={attrs[name]!r}> would load"
    assert [attrs["href"] for attrs, _ in page.find("a")] == ["https://creativecommons.org/licenses/by-sa/4.0/"]
    assert not re.search(r"@import|url\(", text)


def test_markup_in_any_text_is_shown_and_not_obeyed(make_report):
    bad = '<script>alert("1")</script>\'"&<img src=x onerror=y>'
    page = read(
        make_report(
            captions=lambda row_id: [bad, bad],
            prompt=bad,
            query_name=bad,
            query_settings={bad: bad},
            method=bad,
            method_settings={bad: bad},
            model_name=bad,
            dataset_name=bad,
            warnings=[bad],
            timings={bad: Timing(1.0)},
            explanation=bad,
        )
    )
    assert not page.find("script")
    assert len(page.find("img")) == 6 and all(attrs["src"] != "x" for attrs, _ in page.find("img"))
    assert [text for _, text in page.find("div", "caption")] == [bad] * 5
    assert page.find("h1")[0][1] == page.find("p", "read")[0][1] == bad
    assert all(attrs["alt"].startswith(f"Training image: {bad}") for attrs, _ in page.find("img")[1:])


def test_without_images_the_cards_hold_captions(make_report):
    page = read(make_report(image=None))
    assert len(page.find("img")) == 1 and not page.find("image")
    cards = [text for _, text in page.find("div", "words")]
    assert [text.startswith(f"image {row}") for text, row in zip(cards, (14, 12, 10, 13, 11), strict=True)] == [
        True
    ] * 5


def test_one_missing_image_leaves_the_others(make_report):
    page = read(make_report(image={10: None, 11: None, 12: None, 13: None, 14: np.zeros((3, 5, 3), np.uint8)}))
    assert len(page.find("img")) == 2 and len(page.find("div", "words")) == 4


@pytest.mark.parametrize("score", [0.0, 3e-6, -3e-6])
def test_one_image(make_report, score):
    page = read(make_report(row_id=np.array([14]), score=np.array([score]), flip=None, top_k=24))
    assert len(page.find("li", "card")) == 1
    assert not page.find("section", "least")
    assert page.find("h2")[0][1] == "The most influential training image"
    assert len(page.find("div", "bar")) == (score > 0)


def test_all_equal_and_fewer_than_top_k(make_report):
    page = read(make_report(score=np.zeros(5), top_k=24))
    assert [text for _, text in page.find("div", "score")] == ["0.00"] * 5
    assert page.find("h2")[0][1].startswith("The 5 most")


def test_no_flips_means_no_mirrored_images(make_report):
    report = make_report(flip=None)
    page = read(report)
    assert not page.find("span", "tag")
    assert "view" not in [text for _, text in page.find("th")]
    np.testing.assert_array_equal(decode(page.find("img")[1][0]["src"]), report.image(14))


def test_near_duplicates_are_marked_and_their_kinds_listed(make_report):
    page = read(make_report(group={14: "a", 12: "a", 10: "b", 13: "c", 11: "c"}))
    assert [attrs["id"] for attrs, _ in page.find("li", "twin")] == ["rank-2"]
    assert ("#rank-1", "variant of no. 1") in [(attrs["href"], text) for attrs, text in page.find("a")]
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"rank-1", "rank-2", "rank-3"} <= set(ids)
    assert len(page.find("section", "distinct")) == 1 and len(page.find("li", "card")) == 3 + 3 + 2


def test_settings_timings_losses_region_and_warnings_are_told(make_report):
    losses = np.full((5, 2), 0.125)
    page = read(
        make_report(
            region=(4, 8, 12, 16), warnings=["prompt cut at 16 tokens"], loss_before=losses, loss_after=losses + 0.25
        )
    )
    style = page.find("div", "region")[0][0]["style"]
    assert "left:25.0%;top:50.0%;width:50.0%;height:50.0%" in style
    assert page.find("ul", "notes")[0][1] == "prompt cut at 16 tokens"
    rows = [text for _, text in page.find("tr")]
    assert any("14" in row and "8.0000e-05" in row and "0.125000" in row and "0.375000" in row for row in rows)
    cells = [text for _, text in page.find("td")]
    assert {"DDIM, 50 steps", "0.01", "1 min 02 s", "stored result reused", "3.2 s"} <= set(cells)


def test_a_region_mask_lies_over_the_query(make_report):
    mask = np.zeros((16, 16), bool)
    mask[4:12, 2:6] = True
    page = read(make_report(region_mask=mask))
    (attrs,) = [attrs for _, attrs, _ in page.tags if attrs.get("class") == "region-mask"]
    overlay = decode(attrs["src"])
    assert overlay.shape == (768, 768, 4)
    clear = overlay[..., 3] == 0
    assert clear[4 * 48 + 4 : 12 * 48 - 4, 2 * 48 + 4 : 6 * 48 - 4].all()
    assert clear.sum() == (8 * 48 - 8) * (4 * 48 - 8)
    assert ("the outlined pixels only: 12 % of the image") in [text for _, text in page.find("dd")]


def test_regions_show_the_images_that_they_owe_most_to(make_report):
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
    regions = [Region(box, ((10 + number, number % 2, 0.4213), (14, 0, 0.00042))) for number, box in enumerate(boxes)]
    page = read(make_report(regions=regions))
    cells = page.find("div", "cell")
    assert [text for _, text in cells] == ["42 %"] * 4
    assert "--columns:2" in page.find("div", "regions-grid")[0][0]["style"]
    outlines = [attrs["style"] for attrs, _ in page.find("i") if "left" in attrs.get("style", "")]
    assert outlines[1] == "left:50.0%;top:0.0%;width:50.0%;height:50.0%" and len(outlines) == 4
    titles = [attrs["title"] for attrs, _ in page.find("span") if "row" in attrs.get("title", "")]
    assert titles[:3] == ["image 10, row 10: 42 %", "image 14, row 14: 0.042 %", "image 11, mirrored, row 11: 42 %"]
    shown = [decode(attrs["src"]) for attrs, _ in page.find("img") if attrs.get("alt", "").startswith("image 11, m")]
    np.testing.assert_array_equal(shown[-1], image_of(11)[:, ::-1])
    # Captions stand in for images that are not there, and without regions there is no such section.
    bare = read(make_report(regions=regions, image=None))
    words = [text for _, text in bare.find("em") if text != "mirrored"]
    assert words[:2] == ["image 10", "image 14"]
    assert not read(make_report()).find("section", "regions")


def test_both_histograms_draw_every_score_once(make_report):
    page = read(make_report())
    drawings = page.find("svg")
    assert [attrs["class"] for attrs, _ in drawings] == ["wide", "narrow"]
    counts = [int(text.split()[0]) for _, text in page.find("title")[1:]]
    assert sum(counts) == 2 * 5


def test_large_images_are_reduced(make_report):
    noise = np.random.default_rng(0).integers(0, 256, (900, 600, 3), dtype=np.uint8)
    page = read(make_report(image=lambda row_id: noise))
    assert decode(page.find("img")[1][0]["src"]).shape == (400, 267, 3)


def test_a_failed_write_keeps_the_earlier_page(make_report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, make_report())
    earlier = path.read_bytes()
    assert earlier.decode("utf-8") == render_report(make_report())

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_report(path, make_report(prompt="another"))
    assert path.read_bytes() == earlier and list(tmp_path.iterdir()) == [path]
