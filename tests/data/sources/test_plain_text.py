"""One text is one string, however its bytes are written and whatever kind of source holds it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from usllm.data import SourceSpec
from usllm.data.sources import read_documents, read_text
from usllm.system.errors import UserError

TEXT = "first é\nsecond\n\nthird"

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "CRLF with a mark": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
}


def _row_of(content: bytes) -> str:
    """What a program that knows nothing of marks and line ends puts into a string."""
    return content.decode("utf-8")


def _text(folder: Path, content: bytes) -> SourceSpec:
    (folder / "a.txt").write_bytes(content)
    return SourceSpec(kind="text", path=str(folder / "a.txt"))


def _jsonl(folder: Path, content: bytes) -> SourceSpec:
    (folder / "a.jsonl").write_text(json.dumps({"text": _row_of(content)}) + "\n")
    return SourceSpec(kind="jsonl", path=str(folder / "a.jsonl"))


def _parquet(folder: Path, content: bytes) -> SourceSpec:
    Dataset.from_dict({"text": [_row_of(content)]}).to_parquet(folder / "a.parquet")
    return SourceSpec(kind="parquet", path=str(folder / "a.parquet"))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("source", [_text, _jsonl, _parquet], ids=["text", "jsonl", "parquet"])
def test_every_encoding_in_every_kind_gives_one_text(
    source: Callable[[Path, bytes], SourceSpec], encoding: str, tmp_path: Path
) -> None:
    assert read_text(source(tmp_path, ENCODINGS[encoding](TEXT)), "x") == TEXT


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_lines_are_read_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    lines = '{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(ENCODINGS[encoding](lines))
    spec = SourceSpec(kind="auto", path=str(tmp_path / "a.jsonl"))
    assert read_documents(spec, "x")["text"][:] == ["one", "two"]


def test_rows_of_the_hub_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["\ufeffone\r\n", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert read_documents(SourceSpec(kind="hub", name="a/b"), "x")["text"][:] == ["one\n", "two"]


def test_the_mark_of_each_file_is_removed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(codecs.BOM_UTF8 + name.encode())
    spec = SourceSpec(kind="text", path=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert read_text(spec, "x") == "ab"


LATE = b"x" * 100_000  # beyond what is looked at first

REFUSED = {
    "UTF-16 little-endian": (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le"), "is UTF-16 text"),
    "UTF-16 big-endian": (codecs.BOM_UTF16_BE + "ab".encode("utf-16-be"), "is UTF-16 text"),
    "UTF-16 without a mark": ("ab".encode("utf-16-le"), "NUL characters.*UTF-16LE"),
    "UTF-32": (codecs.BOM_UTF32_LE + "ab".encode("utf-32-le"), "is UTF-32 text"),
    "NUL at the start": (b"a\x00b", "holds NUL"),
    "NUL late": (LATE + b"\x00b", "holds a NUL character at character 100000"),
    "Latin-1": ("é".encode("latin-1"), "is not UTF-8 text.*iconv"),
    "Latin-1 late": (LATE + "é".encode("latin-1"), "is not UTF-8 text"),
    "surrogates": (b"\xed\xa0\x80", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_bytes_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    with pytest.raises(UserError, match=rf"data\.train: .*a\.txt.*{message}"):
        read_text(_text(tmp_path, content), "data.train")


@pytest.mark.parametrize(
    ("escape", "message"), [(r"\u0000", "NUL"), (r"\ud800", r"surrogate pair \(\\ud800\) at character 1")]
)
def test_escapes_that_are_no_text_are_refused_with_their_line(escape: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "a' + escape + '"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2 holds .*{message}"):
        read_text(SourceSpec(kind="jsonl", path=str(tmp_path / "a.jsonl")), "x")


def test_row_that_is_no_text_is_refused_with_its_number(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b\x00"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2 holds a NUL"):
        read_text(SourceSpec(kind="parquet", path=str(tmp_path / "a.parquet")), "x")
