"""The README's commands compose, its Python runs, and its tree and tables name what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composing import composed
from tiny_packed import pack, sketched_model

from usllm.cli.command import expand_model, expand_test_sets, folder_of_model, quote_values

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# What each command's main() makes of its arguments before Hydra sees them.
REWRITES = {
    "train": expand_model,
    "export": expand_model,
    "eval": lambda arguments: expand_test_sets(expand_model(arguments)),
    "generate": lambda arguments: quote_values(folder_of_model(arguments), ("prompt", "folder")),
    "inspect": lambda arguments: quote_values(folder_of_model(arguments), ("folder",)),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(usllm-(?:train|eval|export) [^`]*)`", README)
    return sorted({line for line in lines if line.startswith("usllm-") and "…" not in line and "<" not in line})


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").mkdir()
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    if arguments == ["--help"]:
        return
    if "-m" in arguments:  # of a sweep, the first job
        arguments = [argument.split(",")[0] for argument in arguments if argument != "-m"]
    name = program.removeprefix("usllm-")
    composed(*REWRITES.get(name, list)(arguments), command=name)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"^make (\S+)", "\n".join(blocks("bash")), flags=re.MULTILINE))
    assert {"demo", "test"} <= wanted
    assert all(f"\n{target}:" in makefile for target in wanted)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(sketched_model(), tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})


def test_benchmark_scripts_and_experiments_exist() -> None:
    for path in re.findall(r"benchmarks/(\w+)\.py", README):
        assert (ROOT / "benchmarks" / f"{path}.py").is_file()
    row = next(line for line in README.splitlines() if line.startswith("| `experiment` |"))
    named = set(re.findall(r"`(\w+)`", row)) - {"experiment"}
    assert named == {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
