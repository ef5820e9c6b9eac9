"""What comes with the package and what does not, for commands that are run outside of the repository's folder."""

from collections.abc import Sequence
from pathlib import Path

_FOLDER = "configs/"
_FLAGFILE = ("--flagfile", "-flagfile")
_MODELS = ("models/openmoji", "models/openmoji_tower", "models/digits")


def packaged(name: str) -> Path | None:
    """The packaged file of a name such as `configs/quickstart.cfg`, where the current folder does not have it."""
    if not name.startswith(_FOLDER) or Path(name).exists():
        return None
    here = Path(__file__).parent
    # Installed beside this module; in a checkout or an editable installation at the top of the repository.
    for folder in (here / "configs", here.parent / "configs"):
        if (file := folder / name.removeprefix(_FOLDER)).is_file():
            return file
    return None


def find_configs(argv: Sequence[str]) -> list[str]:
    """A command line with packaged configs in place of those that the current folder does not have.

    A packaged flag file is replaced by its flags, in which names of further configs are looked up in the same way.
    """
    found: list[str] = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            return [*found, argument, *arguments]
        if argument in _FLAGFILE and arguments:
            argument += f"={arguments.pop(0)}"
        flag, _, value = argument.partition("=")
        file = packaged(value) if flag.startswith("-") else None
        if file is None:
            found.append(argument)
        elif flag in _FLAGFILE:
            found += find_configs(_flags_of(file))
        else:
            found.append(f"{flag}={file}")
    return found


def check_model_folder(model: str | None) -> None:
    """Raises FileNotFoundError where `model` is one that comes with the repository, and is not in this folder."""
    if model is not None and model.rstrip("/") in _MODELS and not Path(model).exists():
        raise FileNotFoundError(
            f"model is {model!r}, which is not in this folder: it comes with the repository of attrib_jax and is "
            f"not part of the installed package. Run the command in a clone, or give --model=CLONE/{model}"
        )


def _flags_of(file: Path) -> list[str]:
    """The lines of a flag file as absl reads them: one flag a line, without quotes."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "//"))]
