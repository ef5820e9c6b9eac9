"""The site's first page is README.md, with its links as they are from docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """Adds index.md: links to files that the site does not have become text, those into docs/ relative to it."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!docs/|https?://|#)[^)]*\)", r"\1", text).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files
