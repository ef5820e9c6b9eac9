"""Settings: what a config takes and refuses, what of it decides a result, and which settings a config does not read."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from attrib_jax.core.settings import Settings, declared, refuse_unread, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Settings):
    size: int = setting(4, "Size of it.", low=1, high=9)
    rate: float = setting(0.5, "Rate of it.", above=0)
    kind: str = setting("plain", "Kind of it.", choices=("plain", "fancy"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Base):
    bounded: float = setting(0.0, "Bounded number.", low=0, high=1)
    on: bool = setting(False, "Whether it is on.")
    note: str = setting("", "Any text.")
    box: tuple[int, ...] | None = setting(None, "Numbers.", low=0)
    file: str | None = setting(None, "File.", path=True, content=lambda path: f"content of {Path(path).name}")
    files: tuple[str, ...] = setting((), "Files.", path=True, content=lambda paths: sorted(map(len, paths)))
    lace: int = setting(3, "Laces of a fancy one.", low=0, only_if=("kind", "fancy"))
    depth: int = setting(2, "Depth of what is on.", low=0, only_if="on")
    batch: int = setting(0, "Examples at once.", low=0, performance=True, flag="batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Base):
    warmth: float = setting(1.0, "Warmth of it.")


READERS = {"method 'one'": declared(Config), "method 'two'": declared(Other)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("size", value) for value in (0, 10, 2.0, "3", True, None)],
        *[("rate", value) for value in (0, -1.0, math.nan, math.inf, "1", None)],
        *[("bounded", value) for value in (-0.1, 1.1, math.nan)],
        *[("kind", value) for value in ("Plain", 1, None)],
        *[("on", value) for value in (1, "True", None)],
        *[("note", value) for value in (3, Path("note"), None)],
        *[("box", value) for value in ("1,2", 3, (1, -2), (1, 2.5), (1, None))],
        *[("file", value) for value in (3, b"file")],
        *[("files", value) for value in ("file", (3,), None)],
    ],
)
def test_a_value_that_is_not_allowed_is_named(name, value):
    entry = value[1] if isinstance(value, tuple) and len(value) > 1 else value[0] if isinstance(value, tuple) else value
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert name in str(error.value) and repr(entry) in str(error.value)


def test_a_near_name_is_suggested():
    with pytest.raises(ValueError, match="kind 'fansy': did you mean 'fancy'"):
        Config(kind="fansy")


def test_values_have_the_type_that_is_declared():
    config = Config(rate=2, box=[1, 2], files=[Path("a"), "b"], file=Path("c"))
    assert (config.rate, config.box, config.files, config.file) == (2.0, (1, 2), ("a", "b"), "c")
    assert type(config.rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 1.0


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = Config(file="~/a", files=("~/b", "c"), note="~/d")
    assert (config.file, config.files, config.note) == ("/home/someone/a", ("/home/someone/b", "c"), "~/d")


@pytest.mark.parametrize(
    ("given", "name", "needed"),
    [
        ({"lace": 5}, "lace is 5", "kind is 'plain'"),
        ({"depth": 1}, "depth is 1", "on is False"),
        ({"kind": "fancy", "depth": 0}, "depth is 0", "on is False"),
    ],
)
def test_a_setting_that_another_switches_off_is_refused(given, name, needed):
    with pytest.raises(ValueError, match=name) as error:
        Config(**given)
    assert needed in str(error.value)


def test_what_describes_a_result_is_what_decides_it():
    plain = Config().describe()
    assert plain == {
        "size": 4, "rate": 0.5, "kind": "plain", "bounded": 0.0, "on": False, "note": "", "box": None, "file": None,
        "files": [],
    }  # fmt: skip
    assert Config(batch=64).describe() == plain
    full = Config(kind="fancy", lace=7, on=True, box=(1, 2), file="x/y", files=("abc", "d")).describe()
    changed = {"kind": "fancy", "lace": 7, "on": True, "depth": 2, "box": [1, 2]}
    assert full == {**plain, **changed, "file": "content of y", "files": [1, 3]}
    assert json.loads(json.dumps(full)) == full


def test_declarations_are_read_in_order_with_their_types():
    found = declared(Config)
    assert [*found][:4] == ["size", "rate", "kind", "bounded"]
    assert found["box"][1:5] == (int, True, True, None) and found["files"][1:5] == (str, True, False, ())
    assert (found["batch"].flag, found["size"].flag) == ("batch_size", "size")


def test_a_field_that_no_flag_can_have_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd(Settings):
        table: dict = setting(None, "Table.")

    with pytest.raises(TypeError, match="dict"):
        declared(Odd)


def test_settings_of_other_configs_are_refused_naming_their_owners():
    refuse_unread({"size": 3, "lace": 1}, "method 'one'", READERS)
    for name, chosen, owners in (
        ("warmth", "method 'one'", "belongs to method 'two'"),
        ("lace", "method 'two'", "belongs to method 'one'"),
        ("colour", "method 'two'", "belongs to method none"),
    ):
        with pytest.raises(ValueError, match=f"{name} is 7, but {chosen}.*{owners}"):
            refuse_unread({name: 7}, chosen, READERS)


def test_a_setting_may_depend_on_one_of_several_values():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Several(Settings):
        kinds: tuple[str, ...] = setting(("plain",), "Kinds.", choices=("plain", "warm"))
        heat: float = setting(0.5, "Heat.", only_if=("kinds", "warm"))

    assert Several(kinds=("plain", "warm"), heat=2.0).describe() == {"kinds": ["plain", "warm"], "heat": 2.0}
    assert "heat" not in Several().describe()
    with pytest.raises(ValueError, match="heat is 2.0, but kinds is .'plain',.*belongs to kinds='warm'"):
        Several(heat=2.0)
