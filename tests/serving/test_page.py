"""The page in a real browser: typing, pictures, boxes, methods, uploads, two tabs."""

import shutil
import threading
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api") if CHROMIUM else None
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, page):
    """A new tab on the page; a script error or a message on the console fails the test."""
    errors = []
    tab = browser.new_page()
    tab.set_default_timeout(60_000)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto(page[0])
    tab.wait_for_selector(".pane", state="attached")
    yield tab
    tab.close()
    # Chromium logs every answer that is not 2xx; the page shows those itself.
    assert [error for error in errors if "Failed to load resource" not in error] == []


def ask(tab, prompt, pane=0):
    tab.fill("#prompt", prompt)
    tab.click("#go")
    wait(tab, pane)


def wait(tab, pane=0):
    until(tab, f"document.querySelectorAll('.pane')[{pane}].querySelector('.status').textContent.includes('images in')")


def until(tab, expression, argument=None):
    """Waits until an expression is true; as the page's policy forbids what playwright's own function does."""
    end = time.monotonic() + 60
    while not tab.evaluate(f"argument => {expression}", argument):
        assert time.monotonic() < end, f"{expression}: {tab.inner_text('body')}"
        tab.wait_for_timeout(30)


def rows(tab, pane=0):
    return tab.eval_on_selector_all(
        f".pane:nth-child({pane + 1}) .card img", "images => images.map(image => image.src.split('/').pop())"
    )


def test_a_prompt_gives_a_picture_and_its_training_images(tab):
    ask(tab, "digit one")
    assert tab.evaluate("document.getElementById('image').naturalWidth") == 8
    found = rows(tab)
    assert len(found) == 13 == len(set(found))
    until(tab, "[...document.querySelectorAll('.card img')].every(image => image.complete && image.naturalWidth)")
    with tab.expect_download() as download:
        tab.click(".csv")
    lines = open(download.value.path(), encoding="utf-8").read().splitlines()
    assert lines[0] == "rank,row_id,score,caption" and [line.split(",")[1] for line in lines[1:]] == found
    with tab.expect_download() as download:
        tab.click(".report")
    assert "digit one" in open(download.value.path(), encoding="utf-8").read()


def test_a_box_another_method_and_two_side_by_side(tab):
    ask(tab, "digit two")
    before = tab.inner_text(".cards")
    place = tab.locator("#stage").bounding_box()
    tab.mouse.move(place["x"] + 0.1 * place["width"], place["y"] + 0.1 * place["height"])
    tab.mouse.down()
    tab.mouse.move(place["x"] + 0.6 * place["width"], place["y"] + 0.7 * place["height"])
    tab.mouse.up()
    until(tab, "document.querySelector('.cards').innerText !== argument", before)
    assert tab.is_visible("#box") and tab.evaluate("box") == [0, 0, 5, 6]
    tab.click("#unbox")
    until(tab, "document.querySelector('.cards').innerText === argument", before)
    tab.check("#two")
    wait(tab, 1)
    assert tab.input_value(".pane:nth-child(2) .method") == "features" and len(rows(tab, 1)) == 13
    tab.select_option(".pane:nth-child(2) .method", "exact")
    wait(tab, 1)
    tab.uncheck("#two")
    assert tab.locator(".pane").count() == 1


def test_a_training_image_opens_the_reverse_question(tab):
    ask(tab, "digit three")
    tab.click(".card")
    tab.wait_for_selector("#reverse-list li")
    assert tab.is_visible("#reverse") and "digit" in tab.inner_text("#reverse-list")
    tab.click("#close")
    assert not tab.is_visible("#reverse")


def test_broken_uploads_and_empty_prompts_are_messages(tab, tmp_path):
    tab.click("#go")
    assert "prompt is empty" in tab.inner_text("#message")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no picture")
    tab.set_input_files("#upload", broken)
    tab.click("#go")
    tab.wait_for_selector(".status.wrong")
    assert "no PNG, JPEG, WebP, GIF or BMP image" in tab.inner_text(".status")
    tab.click("#clear")
    ask(tab, "digit one")
    assert len(rows(tab)) == 13


def test_a_second_tab_waits_is_told_so_and_can_cancel(tab, browser, page):
    address, worker = page
    gate = threading.Event()
    blocking = worker.submit(lambda: gate.wait(60))
    other = browser.new_page()
    other.goto(address)
    other.wait_for_selector(".pane", state="attached")
    try:
        for each in (tab, other):
            each.fill("#prompt", "digit two")
            each.click("#go")
            until(each, "document.querySelector('.status').textContent.includes('before yours')")
        assert "waiting: 1 request before yours" in tab.inner_text(".status")
        assert "waiting: 2 requests before yours" in other.inner_text(".status")
        other.click(".cancel")
        until(other, "document.querySelector('.status').textContent === 'cancelled'")
    finally:
        gate.set()
    wait(tab)
    assert blocking.done.wait(10) and len(rows(tab)) == 13
    other.close()
