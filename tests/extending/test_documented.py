"""The page shows the files that the tests run, and no others."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "extending" / "example_plugin"
SHOWN = re.compile(r"^`(tests/extending/\S+)`\n\n```\w+\n(.*?)```$", re.MULTILINE | re.DOTALL)


def test_page_shows_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = dict(SHOWN.findall(page))
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(encoding="utf-8"), f"docs/extending.md shows another {name}"
    files = {path for pattern in ("*.py", "*.yaml") for path in PLUGIN.rglob(pattern) if path.name != "__init__.py"}
    assert {str(path.relative_to(ROOT)) for path in files} == set(shown)
