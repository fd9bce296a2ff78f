"""The page in Chromium: it renders, sorts by a press, keeps its width, logs no error and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PROBE = """
const cells = (column) => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[column].textContent);
const heads = [...document.querySelectorAll("thead th")];
const press = (title) => {
  const column = heads.findIndex((head) => head.dataset.title === title);
  heads[column].querySelector("button").click();
  return { cells: cells(column), state: heads.map((head) => head.ariaSort).join(" "), column };
};
const seen = {
  first: press("wikitext2 finetuned"),
  again: press("wikitext2 finetuned"),
  text: press("allocation"),
  labels: cells(0),
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  table: document.querySelector(".scroll").scrollWidth > document.querySelector(".scroll").clientWidth,
  drawings: [...document.querySelectorAll("figure svg")].map((drawing) => drawing.getBoundingClientRect().height),
  ink: getComputedStyle(document.querySelector("figure svg text")).fill,
  focusable: heads.every((head) => head.querySelector("button").tabIndex === 0),
};
const result = document.createElement("pre");
result.id = "probe";
result.textContent = JSON.stringify(seen);
document.body.append(result);
"""


def browse(page: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a display or a network."""
    assert BROWSER is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    fixed += [f"--user-data-dir={folder / 'profile'}", "--window-size=1440,900", "--enable-logging=stderr"]
    command = [BROWSER, *fixed, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probed(written: Path, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the probe saw on the page, and what the browser had to say."""
    page = (written / "report.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    # The page's policy lets no other script run; this copy allows the probe too.
    page = page.replace("script-src ", f"script-src &#39;sha256-{digest}&#39; ")
    copy = folder / "probed.html"
    copy.write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    done = browse(copy, folder, "--dump-dom", *arguments)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1])), done.stderr


@pytest.fixture(scope="module")
def seen(written: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return probed(written, tmp_path_factory.mktemp("browser"))


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells if cell != "-"]


def test_a_press_sorts_and_another_turns_round(seen: tuple[dict[str, Any], str]) -> None:
    first, again = seen[0]["first"], seen[0]["again"]
    assert numbers(first["cells"]) == sorted(numbers(first["cells"]))
    assert numbers(again["cells"]) == sorted(numbers(again["cells"]), reverse=True)
    assert len(numbers(first["cells"])) == 7
    assert first["cells"][-2:] == again["cells"][-2:] == ["-", "-"]  # what is missing stays last


def test_the_sorted_column_alone_tells_its_order(seen: tuple[dict[str, Any], str]) -> None:
    for press, state in (("first", "ascending"), ("again", "descending"), ("text", "ascending")):
        states = seen[0][press]["state"].split()
        assert states[seen[0][press]["column"]] == state
        assert sorted(set(states)) == sorted({state, "none"})


def test_texts_sort_too_and_rows_stay_whole(seen: tuple[dict[str, Any], str]) -> None:
    allocations = seen[0]["text"]["cells"]
    assert allocations == sorted(allocations)
    assert all(name == label.rpartition(", ")[2] for name, label in zip(allocations, seen[0]["labels"], strict=True))


def test_nothing_is_asked_for_and_nothing_complained_of(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["requests"] == []
    assert "CONSOLE" not in seen[1]


def test_the_page_keeps_its_width_and_draws_every_figure(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["overflow"] <= 0
    assert seen[0]["table"]  # wide, and scrolled inside its box
    assert len(seen[0]["drawings"]) == 7
    assert min(seen[0]["drawings"]) > 150
    assert seen[0]["focusable"]


def test_drawings_follow_the_dark_scheme(seen: tuple[dict[str, Any], str], written: Path, tmp_path: Path) -> None:
    dark, _ = probed(written, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert seen[0]["ink"] == "rgb(27, 30, 35)"
    assert dark["ink"] == "rgb(230, 232, 235)"


def test_the_page_prints(written: Path, tmp_path: Path) -> None:
    browse(written / "report.html", tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
