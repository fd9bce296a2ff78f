"""``benchmarks/gpu.py --dry-run`` as it is called on a card: nothing of usllm is installed, everything is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_parts.results import COMPLETE, Results
from usllm_kernels.dispatch import installed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PARTS = ("environment", "correctness", "kernels", "training", "generation", "finetuning")
SECONDS = 1200  # four minutes where nothing else runs

# As if they were not installed: neither found nor imported.
BLOCKED = """
from importlib.machinery import PathFinder

BLOCKED = {"lightning", "pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "datasets", "gguf", "numba"}
BLOCKED |= {"llvmlite", "accelerate", "matplotlib", "wandb", "rich", "lm_eval", "xdist", "pytest_timeout"}
find_spec = PathFinder.find_spec

def find_unless_blocked(name, path=None, target=None):
    return None if name.split(".")[0] in BLOCKED else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_unless_blocked)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS + 60),
    pytest.mark.skipif(not installed("triton"), reason="triton is not installed"),
]


def call(out: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # pytest finds its plugins by what is installed, not by what can be imported.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if path is not None else {}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--minutes", str(SECONDS / 60), *arguments]
    return subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True)


def problems(out: Path) -> list[str]:
    lines = Results(out / "results.jsonl").newest().values()
    return [f"{line['part']} {line['key']}: {line['error']}" for line in lines if line.get("error")]


def test_dry_run_and_a_second_call(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(out, "--dry-run")
    assert done.returncode == 0, (problems(out), done.stdout[-2000:], done.stderr[-4000:])
    results = Results(out / "results.jsonl")
    assert {part: results.newest()[part, ""]["status"] for part in PARTS} == dict.fromkeys(PARTS, COMPLETE)
    good = results.good()
    assert {key.partition("::")[0] for part, key in good if part == "correctness"} >= {"test_cuda.py", "test_codec.py"}
    assert ("kernels", "launch parameters") in good
    for point in ("dense", "sketched", "halfway", "trained", "packed"):
        assert good["finetuning", f"perplexity {point}"]["perplexity"] > 1
    assert (out / "packed" / "model.safetensors").is_file()
    assert "| project + query, in copies of the weights | ≤ 1.3 |" in done.stdout
    before = list(results.lines())
    assert call(out, "--dry-run").returncode == 0
    added = list(results.lines())[len(before) :]
    assert [line["part"] for line in added] == ["call", "environment", "environment"]


def test_on_a_machine_without_what_it_must_not_need(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED, encoding="utf-8")
    out = tmp_path / "out"
    done = call(out, "--dry-run", path=tmp_path)
    assert done.returncode == 0, (problems(out), done.stdout[-2000:], done.stderr[-4000:])
    check = [sys.executable, "-c", "import numba"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(check, env=environment, capture_output=True).returncode  # it was not there


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a card is at hand")
    done = call(tmp_path / "out", "--only", "kernels")
    assert done.returncode == 2
    assert done.stderr == "there is no CUDA card that torch can use: run on a CUDA machine, or pass --dry-run\n"
