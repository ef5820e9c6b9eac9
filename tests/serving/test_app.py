"""What the application answers and refuses, over HTTP."""

import io
import json
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from attrib_jax.serving import engine as engine_module


def ask(page, path, data=None, **headers):
    """Status, type and content of an answer."""
    request = urllib.request.Request(page[0] + path, data, headers, method="GET" if data is None else "POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers.get_content_type(), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def answer(page, data=b"", **query):
    """The answer to a question, when its request has ended."""
    status, _, content = ask(page, "/api/ask?" + urllib.parse.urlencode({"method": "instant", **query}), data)
    if status != 200:
        return status, json.loads(content)
    name = json.loads(content)["request"]
    while True:
        status, _, content = ask(page, f"/api/request/{name}?wait=1")
        found = json.loads(content)
        if found.get("state") not in ("waiting", "running"):
            return name, found


def picture(width=20, height=12, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("method", ["instant", "features", "exact"])
def test_every_method_answers_for_a_picture_and_for_a_box(method, page, engine):
    _, whole = answer(page, method=method, prompt="digit one")
    assert whole["state"] == "done" and len(whole["cards"]) == 13 == whole["scored"]
    scores = [card["score"] for card in whole["cards"]]
    assert scores == sorted(scores, reverse=True) and whole["image"].startswith("data:image/png;base64,")
    _, boxed = answer(page, method=method, prompt="digit one", box="0,0,4,8")
    assert boxed["state"] == "done" and {card["row"] for card in boxed["cards"]} == {
        card["row"] for card in whole["cards"]
    }
    assert [card["score"] for card in boxed["cards"]] != scores


def test_an_answer_has_a_report_and_images(page, engine):
    name, found = answer(page, prompt="digit two", seed="3")
    status, kind, content = ask(page, f"/api/request/{name}/report")
    assert (status, kind) == (200, "text/html") and b"digit two" in content and b"looked up in an index" in content
    status, kind, content = ask(page, f"/api/training/{found['cards'][0]['row']}")
    assert (status, kind) == (200, "image/png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(content))),
        engine.run.dataset[engine.position[found["cards"][0]["row"]]].image,
    )


def test_an_upload_is_answered_and_forgotten(page):
    name, found = answer(page, picture(), prompt="digit one")
    assert found["state"] == "done" and found["report"].startswith("<!DOCTYPE html>")
    assert ask(page, f"/api/request/{name}")[0] == 404


def test_the_reverse_question_shows_queries(page, engine):
    row = int(engine.run.dataset.row_ids[2])
    name = json.loads(ask(page, f"/api/reverse/{row}", b"")[2])["request"]
    found = {"state": "waiting"}
    while found["state"] in ("waiting", "running"):
        found = json.loads(ask(page, f"/api/request/{name}?wait=1")[2])
    assert [query["prompt"] for query in found["queries"]] and found["queries"][0]["image"].startswith("data:image/png")


@pytest.mark.parametrize(
    ("query", "data", "message"),
    [
        ({"prompt": " "}, b"", "the prompt is empty"),
        ({"prompt": "x" * 501}, b"", "501 characters; expected at most 500"),
        ({"prompt": "a", "method": "magic"}, b"", "method is 'magic'; expected one of instant"),
        ({"prompt": "a", "seed": "-1"}, b"", "seed is '-1'"),
        ({"prompt": "a", "seed": str(2**32)}, b"", "expected a whole number from 0 to 4294967295"),
        ({"prompt": "a", "box": "1,2,3"}, b"", "box is '1,2,3'; expected four whole numbers"),
        ({"prompt": "a", "box": "0,0,9,9"}, b"", "region is (0, 0, 9, 9): expected x0 < x1"),
        ({"prompt": "a", "box": "0,0,9,9", "method": "exact"}, b"", "expected"),
        ({"prompt": "a"}, b"GIF89a", "a damaged one"),
        ({"prompt": "a"}, picture()[:200], "damaged"),
        ({"prompt": "a"}, b"<svg/>", "no PNG, JPEG, WebP, GIF or BMP image"),
        ({"prompt": "a"}, picture(300, 300), "the image has 90,000 pixels; expected at most 5,000"),
        ({"prompt": "a"}, bytes(20_001), "too large; expected at most 20,000 bytes"),
    ],
)  # fmt: skip
def test_bad_questions_get_messages(query, data, message, page, monkeypatch):
    if data == bytes(20_001):
        monkeypatch.setattr("attrib_jax.serving.app.MAX_UPLOAD_BYTES", 20_000)
    monkeypatch.setattr(engine_module, "MAX_UPLOAD_PIXELS", 5_000)
    _, found = answer(page, data, **query)
    assert message in found["error"] and "Traceback" not in found["error"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/training/2", 404),
        ("/api/training/..%2f..%2fetc%2fpasswd", 404),
        ("/../../etc/passwd", 404),
        ("/static/../app.py", 404),
        ("/api/request/unknown", 404),
        ("/api/request/unknown/report", 404),
    ],
)
def test_nothing_of_a_request_names_a_file(path, status, page):
    assert ask(page, path)[0] == status


def test_other_sites_and_other_names_are_refused(page):
    assert ask(page, "/api/ask?method=instant&prompt=a", b"", Origin="http://evil.example")[0] == 403
    assert ask(page, "/", Host="evil.example")[0] == 400
    assert ask(page, "/")[0] == 200
