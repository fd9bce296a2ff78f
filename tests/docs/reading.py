"""README and the pages under docs/ as tests read them: links, headings, blocks of code, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("usllm-train", "usllm-eval", "usllm-export", "usllm-generate", "usllm-inspect", "usllm-report")


def name(page: Path) -> str:
    """What a page is called in the name of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages; an empty one is that of blocks that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[str]:
    """Commands of usllm in blocks and between backticks, without comments; lines that go on are joined.

    An ellipsis stands for more overrides and is left out; what has a value that the reader has to choose, as in
    ``<id>``, is no command yet.
    """
    lines = [line for block in blocks(page, "bash", "") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(usllm-[a-z]+ [^`]+)`", page.read_text(encoding="utf-8").replace("\n", " "))
    found = set()
    for line in lines:
        start = re.search(rf"(?:^|\s)({'|'.join(COMMANDS)})\s", line)
        if start is None or "$(" in line:
            continue
        words = shlex.split(line[start.start(1) :], comments=True)
        words = [word for word in words if word != "…"]
        if not any("…" in word or "<" in word for word in words) and len(words) > 1:
            found.add(shlex.join(words))
    return sorted(found)


def anchors(page: Path) -> set[str]:
    """What ``#…`` may name on a page: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that are not on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]
