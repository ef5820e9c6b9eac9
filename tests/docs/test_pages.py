"""The pages that programs write are up to date."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_flags_page_is_what_the_commands_define():
    line = [sys.executable, "-m", "launch.flag_docs"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "FLAGS.md").read_text() == result.stdout, f"run {' '.join(line[1:])} > docs/FLAGS.md"
