"""Progress in a log: few whole lines, whatever the number of steps."""

import io
import sys

from attrib_jax.parallel.progress import progress


def test_a_log_gets_few_whole_lines(capsys):
    assert list(progress(range(5000), "fisher", "samples")) == list(range(5000))
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith("fisher: ") for line in lines) and "\r" not in text
    assert lines[-1].startswith("fisher: 5000 of 5000, ") and "samples/s" in lines[-1]


def test_a_resumed_count_starts_where_it_was(capsys):
    with progress(100, "losses", "images", initial=60) as bar:
        bar.update(30)
        bar.update(10)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("losses: 60 of 100") and last.startswith("losses: 100 of 100, ")


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(iter("abc"), "encode", total=3):
        pass
    assert "\r" in stream.getvalue() and "encode: 100%" in stream.getvalue()
