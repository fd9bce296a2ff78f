"""README and docs: every link leads somewhere, every command composes, and what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composing import composed
from reading import PAGES, ROOT, anchors, blocks, commands, links, name

from usllm.cli.arguments import expand_model, expand_test_sets, folder_of_model, quote_values
from usllm.system.renamed_keys import RENAMED, REPLACED

README = ROOT / "README.md"
# What each command's main() makes of its arguments before Hydra sees them.
REWRITES = {
    "train": expand_model,
    "export": expand_model,
    "eval": lambda arguments: expand_test_sets(expand_model(arguments)),
    "generate": lambda arguments: quote_values(folder_of_model(arguments), ("prompt", "folder")),
    "inspect": lambda arguments: quote_values(folder_of_model(arguments), ("folder",)),
}
ABSENT = {"kernels/__init__.py": "the log says why there is none", "conf/local/default.yaml": "of a user's machine"}
"""Files that pages name and that are not here."""
COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(other), f"{target}: no such heading"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / target.partition("#")[0]).resolve() for target in links(page)}
        waiting += [target for target in targets if target in PAGES and target not in reached]
    assert [name(page) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").mkdir()
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    arguments = [argument for argument in arguments if argument not in ("--cfg", "job", "--resolve")]
    if "--help" in arguments:
        return
    if "-m" in arguments:  # of a sweep, the first job
        arguments = [argument.split(",")[0] for argument in arguments if argument != "-m"]
    command_name = program.removeprefix("usllm-")
    composed(*REWRITES.get(command_name, list)(arguments), command=command_name)


def test_commands_are_found() -> None:
    assert {command.split()[0] for command in COMMANDS} == {f"usllm-{name}" for name in (*REWRITES, "report")}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.findall(r"^make ([a-z-]+)", "\n".join(blocks(page, "bash")), flags=re.MULTILINE)
    wanted += re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    assert all(f"\n{target}:" in makefile for target in wanted), wanted


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w/])(?:benchmarks|tests|usllm|conf|kernels|notebooks)/[\w./]+\.(?:py|yaml|md|ipynb)", text
    )
    assert [path for path in named if path not in ABSENT and not (ROOT / path).exists()] == []


def test_experiments_are_all_named() -> None:
    known = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    for page in (README, ROOT / "docs" / "runs.md"):
        assert row_of(page, "experiment") == known


def test_options_that_are_named_exist() -> None:
    page = ROOT / "docs" / "runs.md"
    groups = ("model", "data", "sketch", "allocation", "objective", "stages", "trainer", "evaluation", "logger")
    for group in groups:
        named = {option for option in row_of(page, group) if not option.startswith(".")}
        known = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert named, group
        assert named <= known, f"{group}: {sorted(named - known)}"


def test_renamed_keys_are_all_told() -> None:
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert all(f"| `{old}` | `{new}` |" in text for old, new in (RENAMED | REPLACED).items())


def row_of(page: Path, group: str) -> set[str]:
    """What the row of a group names in a table of choices."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{group}` |")]
    return set(re.findall(r"`([\w.]+)`", rows[0])) - {group}
