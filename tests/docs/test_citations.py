"""What code cites stands in the repository: pages, and the sections of docs/method.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reading import PAGES, ROOT, name

FOLDERS = ("usllm", "kernels", "conf", "benchmarks", "tests")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
CITATION = re.compile(r"(?<![\w/])((?:docs/)?[\w.]+\.md)`*,? *(?:§|section )(\d+)(?:\.(\d+))?")
FOREIGN = re.compile(r"paper's (?:readers|summary)|paper summary|UltraSketchLLM §|(?<![\w/])(?:method|peers)\.md")
"""Words for texts that are not here, or for a page without its place."""


def sources() -> list[Path]:
    """Every source and configuration file but this one."""
    found = [path for folder in FOLDERS for kind in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(kind)]
    return sorted(path for path in found if path != Path(__file__))


def section(number: str) -> str:
    """The text of a section of docs/method.md; empty where there is none."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", METHOD, flags=re.DOTALL | re.MULTILINE)
    return found[0] if found else ""


def cited() -> list[tuple[str, str, str, str]]:
    """(file, page, section, point) of every citation."""
    return [
        (path.relative_to(ROOT).as_posix(), *match.groups(default=""))
        for path in sources()
        for match in CITATION.finditer(path.read_text(encoding="utf-8"))
    ]


def test_cited_sections_exist() -> None:
    found = cited()
    assert len(found) >= 12  # else the pattern no longer sees them
    for file, page, number, point in found:
        assert page == "docs/method.md", f"{file} cites {page}"
        assert section(number), f"{file} cites section {number} of {page}"
        assert not point or re.search(rf"^{point}\. ", section(number), flags=re.MULTILINE), f"{file}: {number}.{point}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_cite_sections_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    of_method = text if page.name == "method.md" else " ".join(re.findall(r"\[[^]]*method\.md\][^.;|]{0,40}", text))
    for number, point in re.findall(r"§(\d+)(?:\.(\d+))?", of_method):
        assert section(number), f"§{number}"
        assert not point or re.search(rf"^{point}\. ", section(number), flags=re.MULTILINE), f"§{number}.{point}"


def test_no_text_is_cited_that_is_not_here() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): match[0]
        for path in [*sources(), *PAGES]
        for match in [FOREIGN.search(re.sub(r"\[[^]]*\]\([^)]*\)", "", path.read_text(encoding="utf-8")))]
        if match
    }
    assert found == {}
