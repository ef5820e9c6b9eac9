"""Fenced blocks of a Markdown page, for tests that execute them."""

import re
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).parents[2]


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, content) of the page's blocks in these languages, in order."""
    found = _FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(language, content) for language, content in found if language in languages]


def python_of(page: str) -> str:
    """All Python blocks of a page as one program, whose line numbers are the page's."""
    text = (ROOT / page).read_text(encoding="utf-8")
    inside, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"
