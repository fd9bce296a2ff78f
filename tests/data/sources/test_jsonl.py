"""Files with one JSON object per line."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from usllm.data import SourceSpec
from usllm.data.sources import read_documents, read_text
from usllm.system.errors import UserError


def _write(path: Path, *records: object) -> SourceSpec:
    content = "\n".join(json.dumps(record) for record in records) + "\n\n"
    path.write_bytes(lzma.compress(content.encode()) if path.suffix == ".xz" else content.encode())
    return SourceSpec(kind="jsonl", path=str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_rows_are_documents_and_join_for_tests(tmp_path: Path, name: str) -> None:
    spec = _write(tmp_path / name, {"text": "one"}, {"text": "two", "other": 1})
    assert read_documents(spec, "data.train")["text"][:] == ["one", "two"]
    assert read_text(spec, "data.train") == "one\n\ntwo"


@pytest.mark.parametrize("record", [{"body": "x"}, {"text": 3}, ["text"]])
def test_row_without_text_is_named(tmp_path: Path, record: object) -> None:
    spec = _write(tmp_path / "a.jsonl", {"text": "one"}, record)
    with pytest.raises(UserError, match=r"data\.train.*line 2.*'text'.*text_field"):
        read_documents(spec, "data.train")


def test_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_documents(SourceSpec(kind="jsonl", path=str(tmp_path / "a.jsonl")), "data.train")
