"""Whatever is typed, no command ends in a traceback: it works, or says in one line what is wrong."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command
from odd_values import SECONDS, STOPPED, Bounded, Odd, odd_configurations

FAST, CHUNK, ALL, PROCESSES = 10, 10, 2000, 20


@pytest.fixture(scope="module")
def made(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run and its packed model."""
    root = tmp_path_factory.mktemp("made")
    trained = command("train", *small(Odd("train", []), tiny_text, root, root), f"run_dir={root}/run", folder=root)
    assert trained.status == 0, trained.output
    packed = command("export", f"ckpt={root}/run", f"out={root}/packed", folder=root)
    assert packed.status == 0, packed.output
    (root / "file").write_text("a file\n")
    (root / "text.txt").write_text(tiny_text.read_text())  # a copy: what is named as a place to write to is written to
    return root


def small(odd: Odd, text: Path, made: Path, here: Path) -> list[str]:
    """The whole command line of an odd configuration."""
    tiny = ["experiment=tiny", "model=random", f"data.train.path={text}", "trainer.max_steps=1", "~callbacks.progress"]
    given = {
        "train": [*tiny, f"output_root={here}/runs", "sketch.rows=1"],
        "eval": ["model=random", f"data=[{text}]", "evaluation.windows=[32]", f"output_root={here}/runs"],
        "export": [f"ckpt={made}/run", f"out={here}/out"],
        "generate": [f"model={made}/packed", "prompt=hi", "max_new_tokens=2"],
        "inspect": [f"model={made}/packed"],
        "report": [f"runs={made}/run", f"out={here}/report"],
    }[odd.command]
    typed = [word.replace("FILE", f"{made}/file").replace("TEXT", f"{made}/text.txt") for word in odd.typed]
    keys = {word.lstrip("+").partition("=")[0].replace("folder", "model") for word in typed}
    return [*(word for word in given if word.partition("=")[0] not in keys), *typed]


def faults(odd: Odd, status: int, output: str) -> list[str]:
    """What is wrong with how a command ended."""
    lines = output.count(f"usllm-{odd.command}: error:")
    found = ["a traceback"] if "Traceback" in output else []
    if status not in (0, 1, 2, STOPPED):
        found.append(f"status {status}")
    if status in (1, 2) and lines != 1:
        found.append(f"{lines} lines that say what is wrong")
    return found


def try_all(first: int, count: int, text: Path, made: Path, here: Path) -> None:
    failed = []
    for number, odd in enumerate(odd_configurations(first, count), first):
        folder = here / str(number)
        typed = small(odd, text, made, folder)
        status, output = command(odd.command, *typed, folder=folder, before=Bounded(made / "cache"))
        if found := faults(odd, status, output):
            words = shlex.join([f"usllm-{odd.command}", *typed])
            failed.append(f"{number}: {' and '.join(found)}: {words}\n{output[-1500:]}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("first", range(0, FAST, CHUNK))
def test_odd_values_end_in_one_line(first: int, tiny_text: Path, made: Path, tmp_path: Path) -> None:
    try_all(first, CHUNK, tiny_text, made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, ALL, 5 * CHUNK))
def test_many_odd_values_end_in_one_line(first: int, tiny_text: Path, made: Path, tmp_path: Path) -> None:
    try_all(first, min(5 * CHUNK, ALL - first), tiny_text, made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ALL, ALL + PROCESSES))
def test_odd_values_end_in_one_line_in_a_process_of_their_own(
    number: int, tiny_text: Path, made: Path, tmp_path: Path
) -> None:
    (odd,) = odd_configurations(number, 1)
    typed = small(odd, tiny_text, made, tmp_path)
    limit = ["bash", "-c", f'ulimit -S -t {3 * SECONDS}; exec "$@"', "limited"]
    done = subprocess.run(
        [*limit, sys.executable, "-m", f"usllm.cli.{odd.command}", *typed],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "USLLM_CACHE": str(tmp_path / "cache")},
    )
    assert not faults(odd, done.returncode, done.stdout + done.stderr), f"{shlex.join(typed)}\n{done.stderr}"
