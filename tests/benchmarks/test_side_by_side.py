"""The comparison with llama.cpp: the page is what the kept result gives, and our side of it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import side_by_side, side_by_side_table
from benchmarks.side_by_side_measure import LONG, measured


def result(**changed: Any) -> dict[str, Any]:
    """A result of three rows."""
    names = {"dense, bf16": "transformers", "sign sketch at 0.5 bits, rest bf16": "transformers", "Q8_0": "llama.cpp"}
    rows = [
        {
            "name": name,
            "engine": engine,
            "ours": "sketch" in name,
            "bytes": 269_000_000 // (place + 1),
            "perplexity": 30.0 * 50**place,
            "tokens_per_second": 10.0 * (place + 1),
            "prompt_tokens_per_second": 200.0,
            "peak": 700_000_000,
        }
        for place, (name, engine) in enumerate(names.items())
    ]
    return {
        "command": "python benchmarks/side_by_side.py",
        "date": "2026-11-27",
        "machine": {"cpu": "a processor"},
        "threads": 1,
        "clock": "cpu",
        "text": "text.txt",
        "windows": 4,
        "window": LONG,
        "llama_cpp": None,
        "rows": rows,
        **changed,
    }


def test_table_has_a_line_for_each_model_and_its_ratio_to_the_dense_one() -> None:
    lines = side_by_side_table.table(result()).splitlines()
    (ours,) = [line for line in lines if "sign sketch" in line]
    assert [cell.strip() for cell in ours.strip("|").split("|")] == [
        *("**sign sketch at 0.5 bits, rest bf16**", "transformers", "134.5", "1,500", "20.0", "2.00", "200", "700"),
    ]
    assert "without llama.cpp" in lines[0]
    assert "1 thread," in lines[0]


def test_picture_is_drawn_with_and_without_llama_cpp() -> None:
    whole = side_by_side_table.picture(result())
    ours = side_by_side_table.picture(result(rows=result()["rows"][:2]))
    assert whole.startswith(b"\x89PNG")
    assert whole != ours


def test_page_is_what_the_kept_result_gives() -> None:
    assert side_by_side_table.main(["--check"]) == 0


def test_figures_of_a_packed_and_a_dense_folder(tmp_path: Path) -> None:
    from tiny_packed import pack, sketched_model

    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense

    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(0, 256, (2, LONG), dtype=np.int32))
    pack(sketched_model(), tmp_path / "packed")
    load_dense(ModelSpec(kind="random", name="llama")).save_pretrained(tmp_path / "dense")
    for name in ("packed", "dense"):
        found = measured("transformers", str(tmp_path / name), tmp_path / "windows.npy", 1, "cpu", 6, 1)
        assert len(found["greedy"]) == 6
        assert 150 < found["perplexity"] < 1000  # of 264 tokens, untrained
        assert found["tokens_per_second"] > 0
        assert found["peak"] > 1e7


def test_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main(["--runs", "somewhere"])
    assert "--text names the text" in capsys.readouterr().err


def test_kept_result_names_its_command_and_machine() -> None:
    kept = json.loads(side_by_side.RESULT.read_text(encoding="utf-8"))
    assert kept["command"].startswith("python benchmarks/side_by_side.py")
    assert kept["machine"]["cpu"]
    assert {row["engine"] for row in kept["rows"]} == {"transformers", "llama.cpp"}
