"""Paths as people write them."""

import os


def expand_path(path: str | os.PathLike) -> str:
    """`path` with a leading `~` or `~user` replaced by that home folder, which no shell does within `--flag=~/x`.

    Raises ValueError where there is no such user, since a folder `~user` would be made, and where the path is empty or
    holds a NUL.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if not text or "\0" in text:
        raise ValueError(f"path is {text!r}; expected the name of a file or folder")
    if expanded.startswith("~"):
        raise ValueError(f"path is {text!r}: there is no such user; write ./{text} for a folder of that name")
    return expanded
