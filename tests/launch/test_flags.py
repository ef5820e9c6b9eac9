"""Flags made from settings: their values reach the config, wrong ones are named, unread ones refused."""

import dataclasses
import os
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from attrib_jax.core.settings import Settings, declared, setting
from attrib_jax.methods import METHODS
from launch.flags import check_unread, define_flags, read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Settings):
    number: float = setting(1.5, "A number.", above=0, flag="own_number", unit="pixels", symbol="x")
    kind: str = setting("newton", "A kind.", choices=("newton", "sgd"), flag="own_kind")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Base):
    whole: int = setting(3, "A whole number.", low=1, flag="own_whole", performance=True)
    several: tuple[float, ...] = setting((0.5, 2.0), "Numbers.", above=0, flag="own_several")
    box: tuple[int, ...] | None = setting(None, "A box.", flag="own_box")
    names: tuple[str, ...] = setting((), "Names.", flag="own_names")
    file: str | None = setting(None, "A file.", path=True, flag="own_file")
    wanted: bool = setting(True, "Whether it is.", flag="own_wanted")


READERS = {"mode 'base'": Base, "mode 'whole'": Config, "mode 'both'": [Base, Config]}


@pytest.fixture(scope="module", autouse=True)
def defined():
    define_flags(Config, defaults={"own_whole": 4})
    yield
    for field in declared(Config).values():
        delattr(flags.FLAGS, field.flag)


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line, which for this test is the program's."""

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        flags.FLAGS(sys.argv)

    with flagsaver.flagsaver():
        yield parsed


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--own_number=2", "number", 2.0),
        ("--own_whole=1", "whole", 1),
        ("--own_kind=sgd", "kind", "sgd"),
        ("--own_several=1,0.25", "several", (1.0, 0.25)),
        ("--own_several=", "several", ()),
        ("--own_box=1,2", "box", (1, 2)),
        ("--own_box=", "box", None),
        ("--own_names=a,b", "names", ("a", "b")),
        ("--own_file=~/x", "file", os.path.expanduser("~/x")),
        ("--own_file=", "file", None),
        ("--noown_wanted", "wanted", False),
    ],
)
def test_values_reach_the_config(parse, argument, name, value):
    parse(argument)
    assert read_config(Config) == dataclasses.replace(Config(whole=4), **{name: value})


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        *((f"--own_number={value}", "number") for value in ("0", "-1", "inf", "nan", "x", "")),
        *((f"--own_whole={value}", "whole") for value in ("0", "1.5", "")),
        ("--own_kind=newtn", "'newton'"),
        *((f"--own_several={value}", "several") for value in ("1,x", "1,0", "nan", "1,,2")),
        ("--own_box=1,2.5", "box"),
    ],
)
def test_wrong_values_are_named(parse, argument, named):
    with pytest.raises((ValueError, flags.Error), match=named):
        parse(argument)
        read_config(Config)


def test_unread_flags_of_the_command_line_are_refused_with_their_owners(parse):
    parse("--own_whole=7", "--own_number=2")
    for chosen in ("mode 'whole'", "mode 'both'"):
        check_unread(chosen, READERS)
    with pytest.raises(ValueError, match="own_whole is 7, but mode 'base' .* belongs to mode 'whole', 'both'"):
        check_unread("mode 'base'", READERS)


def test_unread_flags_of_a_flagfile_are_a_warning(parse, tmp_path, caplog):
    (tmp_path / "some.cfg").write_text("--own_whole=7\n--noown_wanted\n--own_number=2\n")
    parse(f"--flagfile={tmp_path / 'some.cfg'}")
    check_unread("mode 'base'", READERS)
    assert "--own_wanted, --own_whole" in caplog.text and "own_number" not in caplog.text
    with pytest.raises(ValueError, match="own_wanted is False"):
        check_unread("mode 'base'", READERS, flagfiles=True)


def test_a_flag_with_its_default_is_no_mistake(parse):
    parse("--own_whole=4", "--own_wanted")
    check_unread("mode 'base'", READERS)


def test_help_lists_every_flag_of_every_method_with_its_help():
    line = [sys.executable, "-m", "launch.attribute", "--help"]
    shown = " ".join(subprocess.run(line, capture_output=True, text=True, check=False).stdout.split())
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}" in shown.replace("- ", "-")
        for field in declared(method.config).values():
            assert field.name == "method" or f"{field.flag}: {field.setting.help.split(' ')[0]}" in shown
