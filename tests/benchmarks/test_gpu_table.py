"""The section of docs/results.md is what the kept results give; without any it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_table
from benchmarks.gpu_parts.results import FAILED, OK, Refused, Results
from benchmarks.gpu_parts.table import BEGIN, END, NONE, card_of, file_name, page_with, section


def of_a_card(folder: Path, card: str = "NVIDIA H100 80GB HBM3") -> Results:
    folder.mkdir(exist_ok=True)
    results = Results(folder / "results.jsonl")
    results.append("environment", "machine", OK, card=card, driver="580.1", cuda="13.0", versions={"torch": "2.11.0"})
    results.append("correctness", "test_cuda.py::test_a", OK, passed=7)
    results.append("correctness", "test_cuda.py::test_b", FAILED, passed=1, failed=2, error="AssertionError: no")
    figures = {"copy_us": 150.0, "project_query_over_copy": 1.25, "query_over_copy": 1.2, "naive_over_query": 80.0}
    results.append("kernels", "codec 8b.gate absmaxmin-r3", OK, **figures)
    results.append("kernels", "product 8b.gate absmaxmin-r3 1", OK, us=5.0, dense_us=20.0, faster_than_dense=4.0)
    results.append("kernels", "product 8b.gate absmaxmin-r3 8", OK, us=25.0, dense_us=20.0, faster_than_dense=0.8)
    return results


def test_page_holds_what_the_results_give() -> None:
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert page_with(page, section(gpu_table.kept_results())) == page, "run python benchmarks/gpu_table.py"
    if not gpu_table.kept_results():
        assert NONE in page


def test_aims_stand_beside_the_figures(tmp_path: Path) -> None:
    text = section([of_a_card(tmp_path)])
    assert "### NVIDIA H100 80GB HBM3" in text and "Driver 580.1, CUDA 13.0" in text and "torch 2.11.0" in text
    assert "| project + query, in copies of the weights | ≤ 1.3 | 1.25 | 1 of 1 |" in text
    assert "| query, in copies of the weights | ≤ 1.1 | 1.2 | 0 of 1 |" in text
    assert "MLP of 8B at 0.5 bits | ≥ 3 | 4 | 1 of 1 |" in text  # of one token alone
    assert "| training step, over dense | ≤ 1.05 | not measured | |" in text
    assert "8 passed, 2 failed, 0 skipped" in text
    assert "- correctness, test_cuda.py::test_b: failed: `AssertionError: no`" in text


def test_a_figure_that_was_measured_once_stays(tmp_path: Path) -> None:
    results = of_a_card(tmp_path)
    results.append("kernels", "codec 8b.gate absmaxmin-r3", FAILED, error="out of memory")
    text = section([results])
    assert "| ≤ 1.3 | 1.25 | 1 of 1 |" in text
    assert "codec 8b.gate absmaxmin-r3: failed (an earlier figure is shown): `out of memory`" in text


def test_only_results_of_a_card_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    of_a_card(tmp_path / "run")
    assert gpu_table.add(tmp_path / "run", kept).name == "gpu_nvidia_h100_80gb_hbm3.jsonl"
    assert [card_of(results) for results in gpu_table.kept_results(kept)] == ["NVIDIA H100 80GB HBM3"]
    of_a_card(tmp_path / "dry", "CPU (dry run)")
    with pytest.raises(Refused, match="of a dry run"):
        gpu_table.add(tmp_path / "dry", kept)
    with pytest.raises(Refused, match="holds no results of a card"):
        gpu_table.add(tmp_path / "nothing", kept)


def test_a_page_without_the_place_is_refused() -> None:
    assert page_with(f"a\n{BEGIN}\nold\n{END}\nb", " new ") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    with pytest.raises(Refused, match="put them back"):
        page_with("a page", "new")


def test_files_are_named_by_card() -> None:
    assert file_name("NVIDIA H200") == "gpu_nvidia_h200.jsonl"
