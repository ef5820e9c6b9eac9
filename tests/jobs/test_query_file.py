"""Files of many queries: what a line holds, in which encodings, and that a bad one is named."""

import json
import os

import pytest

from attrib_jax.jobs.query import Query
from attrib_jax.jobs.query_file import read_queries


@pytest.fixture
def file(tmp_path):
    return tmp_path / "queries.jsonl"


def test_a_file_of_queries(file):
    (file.parent / "images").mkdir()
    (file.parent / "images" / "cat.png").write_bytes(b"")
    lines = [
        {"prompt": "hat", "seed": 3, "name": "first", "guidance_scale": 2},
        {"prompt": "", "image": "images/cat.png"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (first, second), names = read_queries(file, Query(prompt="ignored", seed=7, sampler_steps=9))
    assert names == ["first", None]
    assert (first.prompt, first.seed, first.guidance_scale, first.sampler_steps) == ("hat", 3, 2, 9)
    assert (second.prompt, second.seed, second.guidance_scale, second.sampler_steps) == ("", 7, 7.5, 9)
    assert os.fspath(second.image) == os.fspath(file.parent / "images" / "cat.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no queries"),
        ("\n  \n", "has no queries"),
        ('{"prompt": "hat"}\n{"prompt": "hat"', "line 2: "),
        ('"hat"', "line 1: '\"hat\"'"),
        ('{"seed": 1}', "line 1: prompt "),
        ('{"prompt": "hat", "sead": 1}', "line 1: .*'sead'.* prompt, seed"),
        ('{"prompt": 3}', "line 1: prompt is 3"),
        ('{"prompt": "hat", "seed": 1.5}', "line 1: seed is 1.5"),
        ('{"prompt": "hat", "seed": true}', "line 1: seed is True"),
        ('{"prompt": "hat", "seed": -1}', "line 1: seed is -1"),
        ('{"prompt": "hat", "guidance_scale": "2"}', "line 1: guidance_scale is '2'"),
        ('{"prompt": "hat", "name": "a/b"}', "line 1: query_name is 'a/b'"),
        ('{"prompt": "hat", "image": "nowhere.png"}', "line 1: .*nowhere.png"),
        ('{"prompt": "a", "name": "x"}\n\n{"prompt": "b", "name": "x"}', "line 3: name 'x' .*line 1"),
        ("\n".join(["[]"] * 12), r"line 1: .*\n.*line 2: [^$]*and 2 more"),
    ],
)
def test_bad_lines_are_named(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_queries(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_files_in_other_encodings(file, encoding):
    lines = ["ein Hündchen" if encoding == "cp1252" else "ein\u2028Hünd\x85chen \u72d7", "two"]
    file.write_text("\r\n".join(f'{{"prompt": "{line}"}}' for line in lines), encoding=encoding, newline="")
    assert [query.prompt for query in read_queries(file).queries] == lines


def test_files_that_are_absent_or_no_text(file):
    with pytest.raises(FileNotFoundError, match=str(file)):
        read_queries(file)
    file.write_bytes(b"\x89PNG\xff\xfe\0")
    with pytest.raises(ValueError, match=file.name):
        read_queries(file)


def test_half_a_surrogate_pair_becomes_a_question_mark(file):
    file.write_text('{"prompt": "cut \\ud83d"}')
    assert read_queries(file).queries[0].prompt == "cut ?"
