"""The comparison with llama.cpp: the page is what the kept result gives, and our side of it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import side_by_side, side_by_side_models, side_by_side_table
from benchmarks.side_by_side_measure import LONG, measured
from usllm.system.code_version import code_version
from usllm.system.machine import machine

CALL = {
    "command": "python benchmarks/side_by_side.py",
    "began": "2026-11-27 10:00",
    "code": {"usllm": "0.1.0", "commit": "0123456789abcdef", "changed": True},
}
MODELS = ("dense, bf16", "sign sketch at 0.5 bits, rest bf16", "sign sketch at 0.5 bits, rest bf16", "Q8_0")


def result(**changed: Any) -> dict[str, Any]:
    """A result of four rows."""
    names = zip(MODELS, ("transformers", "transformers", "vLLM", "llama.cpp"), strict=True)
    rows = [
        {
            "name": name,
            "engine": engine,
            "ours": "sketch" in name,
            "bytes": 269_000_000 // (place + 1),
            "call": CALL,
            "perplexity": 30.0 * 50**place,
            "tokens_per_second": 10.0 * (place + 1),
            "prompt_tokens_per_second": 200.0,
            "peak": 700_000_000,
        }
        for place, (name, engine) in enumerate(names)
    ]
    return {
        "machine": {"cpu": "a processor"},
        "threads": 1,
        "clock": "cpu",
        "text": "text.txt",
        "windows": 4,
        "window": LONG,
        "tokens": 6,
        "rounds": 1,
        "llama_cpp": None,
        "vllm": None,
        "tokens_as_transformers": None,
        "not_measured": [],
        "rows": rows,
        **changed,
    }


def test_table_has_a_line_for_each_model_and_its_ratio_to_the_dense_one() -> None:
    lines = side_by_side_table.table(result()).splitlines()
    ours, in_vllm = [line for line in lines if "sign sketch" in line]
    name, engine, *figures = (cell.strip() for cell in ours.strip("|").split("|"))
    assert (name, engine) == ("**sign sketch at 0.5 bits, rest bf16**", "transformers")
    assert figures == ["134.5", "1,500", "20.0", "2.00", "200", "700", "1"]
    assert [cell.strip() for cell in in_vllm.strip("|").split("|")][:6:5] == [name, "3.00"]
    assert "without llama.cpp, without vLLM" in lines[0]
    assert "1 thread," in lines[0]
    assert lines[-1] == "1. 2026-11-27 10:00, commit 0123456789 and changes: `python benchmarks/side_by_side.py`"
    assert not any("Not measured" in line or "different calls" in line for line in lines)


def test_table_says_which_rows_are_missing_and_which_are_of_which_call() -> None:
    given = result(not_measured=["Q2_0", "Q4_0"])
    given["rows"][0]["call"] = {**CALL, "began": "2026-11-28 09:00", "code": {"usllm": "0.1.0"}}
    lines = side_by_side_table.table(given).splitlines()
    assert [line.strip("| ").rpartition("|")[2].strip() for line in lines if line.endswith("|")][2:] == ["2", *"111"]
    assert "Not measured: Q2_0; Q4_0." in lines
    assert [line.partition(":")[0] for line in lines[-2:]] == ["1. 2026-11-27 10", "2. 2026-11-28 09"]
    assert "no commit known" in lines[-1]


def test_picture_is_drawn_with_and_without_the_other_engines() -> None:
    pictures = [side_by_side_table.picture(result(rows=result()["rows"][:rows])) for rows in (2, 3, 4)]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3


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


class TestOnly:
    """Rows of an older result beside new ones."""

    @pytest.fixture(autouse=True)
    def kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A kept result of four rows on this machine, and models that are measured in no time."""
        path = tmp_path / "side_by_side.json"
        listed = [
            side_by_side_models.Model(row["name"], row["engine"], tmp_path, lambda out: None)
            for row in [*result()["rows"], {"name": "Q2_0", "engine": "llama.cpp"}]
        ]
        figures = {"perplexity": 1.0, "tokens_per_second": 1.0, "prompt_tokens_per_second": 1.0, "peak": 1}
        monkeypatch.setattr(side_by_side, "RESULT", path)
        monkeypatch.setattr(side_by_side, "_write_windows", lambda given: None)
        monkeypatch.setattr(side_by_side, "_measure", lambda given, engine, path: figures)
        monkeypatch.setattr(side_by_side_models, "models", lambda root, runs: listed)
        path.write_text(json.dumps(result(machine=machine())), encoding="utf-8")
        return path

    def measured_again(self, tmp_path: Path, *options: str) -> None:
        """A call for one row: that of our model in transformers."""
        words = ["--text", "text.txt", "--models", str(tmp_path), "--clock", "cpu", "--windows", "4", "--tokens", "6"]
        side_by_side.main([*words, "--rounds", "1", "--only", "transformers: sign", *options])

    def test_a_row_that_is_measured_again_says_its_own_call_and_the_others_stay(
        self, kept: Path, tmp_path: Path
    ) -> None:
        before = json.loads(kept.read_text(encoding="utf-8"))
        self.measured_again(tmp_path)
        after = json.loads(kept.read_text(encoding="utf-8"))
        assert [row["name"] for row in after["rows"]] == list(MODELS)
        assert [after["rows"][stays] == before["rows"][stays] for stays in range(4)] == [True, False, True, True]
        assert after["rows"][1]["call"]["code"] == code_version() and after["rows"][1]["call"]["began"] > "2026-11-27"
        assert after["not_measured"] == ["llama.cpp: Q2_0"]
        assert "2. " in side_by_side_table.table(after)

    @pytest.mark.parametrize(
        ("options", "told"), [(["--threads", "2"], "threads=1"), (["--clock", "wall"], "clock=cpu")]
    )
    def test_rows_that_were_measured_otherwise_are_not_mixed(
        self, kept: Path, tmp_path: Path, options: list[str], told: str
    ) -> None:
        before = kept.read_text(encoding="utf-8")
        with pytest.raises(SystemExit, match=told):
            self.measured_again(tmp_path, *options)
        assert kept.read_text(encoding="utf-8") == before

    def test_rows_of_another_machine_are_not_mixed(self, kept: Path, tmp_path: Path) -> None:
        kept.write_text(json.dumps(result()), encoding="utf-8")
        with pytest.raises(SystemExit, match="a processor"):
            self.measured_again(tmp_path)


def test_kept_result_names_its_command_and_machine() -> None:
    kept = json.loads(side_by_side.RESULT.read_text(encoding="utf-8"))
    assert all(row["call"]["command"].startswith("python benchmarks/side_by_side.py") for row in kept["rows"])
    assert kept["machine"]["cpu"]
    assert {row["engine"] for row in kept["rows"]} == {"transformers", "vLLM", "llama.cpp"}
