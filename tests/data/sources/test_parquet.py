"""Parquet files."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from usllm.data import SourceSpec
from usllm.data.sources import read_documents, read_text
from usllm.system.errors import UserError


def _write(path: Path, columns: dict[str, list[object]]) -> SourceSpec:
    Dataset.from_dict(columns).to_parquet(path)
    return SourceSpec(kind="parquet", path=str(path))


def test_rows_are_documents_and_join_for_tests(tmp_path: Path) -> None:
    spec = _write(tmp_path / "a.parquet", {"text": ["one", None, "two"], "id": [1, 2, 3]})
    assert read_documents(spec, "data.train")["text"][:] == ["one", "two"]
    assert read_text(spec, "data.train") == "one\n\ntwo"


def test_missing_column_lists_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'text' but \['body'\]"):
        read_documents(_write(tmp_path / "a.parquet", {"body": ["x"]}), "data.train")


def test_column_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1 has no text in 'text'; set text_field"):
        read_documents(_write(tmp_path / "a.parquet", {"text": [1]}), "data.train")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("hello, not parquet")
    with pytest.raises(UserError, match="as parquet"):
        read_documents(SourceSpec(kind="parquet", path=str(tmp_path / "a.parquet")), "data.train")
