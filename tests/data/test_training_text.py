"""What calibration reads of a streamed text: the beginning of training's, once, counting what it leaves out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.models.random_model import byte_tokenizer


def streamed(tmp_path: Path, **options: Any) -> TextDataModule:
    rows = [json.dumps({"text": f"document {number} of a few words"}) + "\n" for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(rows[:20]) + "broken\n" + "".join(rows[20:]))
    source = SourceSpec(kind="jsonl", path=str(tmp_path / "a.jsonl"), streaming=True)
    given = {"context_length": 16, "validation_documents": 5, "on_bad": "skip", "shuffle_buffer": 64, **options}
    return TextDataModule(byte_tokenizer(), source, cache_dir=tmp_path / "cache", **given)


def ids(data: TextDataModule, count: int) -> list[list[int]]:
    return [batch["input_ids"][0].tolist() for batch in data.calibration_batches(count)]


def test_first_sequences_of_a_stream_are_read_and_tokenised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = streamed(tmp_path)
    with pytest.warns(UserWarning, match="is skipped"):
        first = ids(data, 40)
    with monkeypatch.context() as context:
        context.setattr("usllm.data.streaming.order.read_rows", lambda *_: pytest.fail("read once more"))
        assert ids(data, 40) == first
        assert ids(data, 12) == first[:12]
    assert ids(data, 50)[:40] == first


def test_what_calibration_leaves_out_is_counted_and_told_once(tmp_path: Path) -> None:
    data = streamed(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ids(data, 40)
        ids(data, 80)
    (line,) = [str(each.message) for each in told if "is skipped" in str(each.message)]
    assert "a.jsonl, line 21 is not JSON" in line
    assert data.stream_facts()["data.train"]["skipped"]["rows"] >= 1
