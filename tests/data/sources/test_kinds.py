"""The kind of a file: name and first bytes must agree, and a kind that was given must agree with one of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from datasets import Dataset

from usllm.data import SourceSpec
from usllm.data.sources import read_documents
from usllm.data.sources.files import HEAD_BYTES
from usllm.data.sources.kinds import with_kind
from usllm.system.errors import UserError

LINES = b'{"text": "one"}\n{"text": "two"}\n'
LONG_LINE = json.dumps({"text": "word " * HEAD_BYTES}).encode()
ARRAY = json.dumps([{"text": "one"}, {"text": "two"}]).encode()
LONG_ARRAY = json.dumps([{"text": f"row {number}"} for number in range(HEAD_BYTES // 8)]).encode()
INDENTED = json.dumps({"rows": [{"text": "one"}]}, indent=2).encode()
PROSE = b"[1] A text that begins with a bracket.\n\n{and} a brace"
BRACE = b'{"quoted" prose}\nmore'
PARQUET = b"PAR1..."


def _spec(folder: Path, name: str, content: bytes, kind: str = "auto") -> SourceSpec:
    packers = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}
    path = folder / name
    path.write_bytes(packers.get(path.suffix, bytes)(content))
    return SourceSpec(kind=kind, path=str(path))


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", PROSE, "text"),
        ("a.txt", BRACE, "text"),
        ("a.txt", b"", "text"),
        ("a", PROSE, "text"),
        ("README.dat", PROSE, "text"),
        ("a.txt.bz2", PROSE, "text"),
        ("a.jsonl", LINES, "jsonl"),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES, "jsonl"),
        ("a.jsonl", b"\n" + LONG_LINE, "jsonl"),
        ("a.jsonl", b"", "jsonl"),
        ("a.JSONL", LINES, "jsonl"),
        ("a.json", LINES, "jsonl"),
        ("a", LINES, "jsonl"),
        ("a.jsonl.bz2", LINES, "jsonl"),
        ("a.jsonl.gz", LINES, "jsonl"),
        ("a.ndjson.xz", LINES, "jsonl"),
        ("a.parquet", PARQUET, "parquet"),
        ("a", PARQUET, "parquet"),
    ],
)
def test_name_and_first_bytes_give_the_kind(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    assert with_kind(_spec(tmp_path, name, content), "x").kind == kind


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", LINES, ["plain text by its name", "begins like JSON lines", "x.kind=text or x.kind=jsonl"]),
        ("a.txt", ARRAY, ["plain text by its name", "begins like a JSON document", "x.kind=text"]),
        ("a.txt", PARQUET, ["begins like Parquet", "x.kind=parquet"]),
        ("a.txt.bz2", LINES, ["begins like JSON lines"]),
        ("a.jsonl", PROSE, ["JSON lines by its name", "begins like plain text"]),
        ("a.json", PROSE, ["begins like plain text"]),
        ("a.json", ARRAY, ["one JSON document", "jq -c '.[]'"]),
        ("a.json", LONG_ARRAY, ["one JSON document"]),
        ("a.json", INDENTED, ["one JSON document"]),
        ("a", ARRAY, ["one JSON document"]),
        ("a.jsonl.bz2", ARRAY, ["one JSON document"]),
        ("a.parquet", LINES, ["Parquet by its name", "begins like JSON lines"]),
        ("a.parquet.gz", PARQUET, ["Parquet files are not unpacked"]),
        ("a.csv", PROSE, ["a table by its name", "as JSON lines", "x.kind=text"]),
        ("a.tsv.gz", PROSE, ["a table by its name"]),
    ],
)
def test_disagreement_is_refused_with_the_way_to_say_it(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        with_kind(_spec(tmp_path, name, content), "x")
    message = str(refused.value)
    assert name in message
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        *(("text", "a.txt", LINES), ("text", "a.jsonl", PROSE), ("jsonl", "a.txt", LINES), ("text", "a.txt", ARRAY)),
        ("text", "a.csv", PROSE),
    ],
)
def test_given_kind_wins_where_name_or_bytes_agree_with_it(
    kind: str, name: str, content: bytes, tmp_path: Path
) -> None:
    assert with_kind(_spec(tmp_path, name, content, kind), "x").kind == kind


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("text", "a.jsonl", LINES, "JSON lines by its name and its first bytes, not plain text: pass x.kind=jsonl"),
        ("text", "a.json", ARRAY, "not plain text"),
        ("text", "a.parquet", PARQUET, "pass x.kind=parquet"),
        ("jsonl", "a.txt", PROSE, "pass x.kind=text"),
        ("jsonl", "a.json", ARRAY, "one JSON document"),
        ("parquet", "a.jsonl", LINES, "pass x.kind=jsonl"),
    ],
)
def test_given_kind_is_refused_where_name_and_bytes_say_another(
    kind: str, name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"a\.\w+ is ") as refused:
        with_kind(_spec(tmp_path, name, content, kind), "x")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", gzip.compress(PROSE, mtime=0), "ends in .gz"),
        ("a.txt", bz2.compress(PROSE), "ends in .bz2"),
        ("a.jsonl", lzma.compress(LINES), "ends in .xz"),
        ("a.txt", b"PK\x03\x04rest", "unpack it first"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfdrest", "unpack it first"),
    ],
)
def test_packing_that_the_name_does_not_say_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        with_kind(SourceSpec(kind="auto", path=str(tmp_path / name)), "x")


def test_file_that_is_not_packed_as_its_name_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(PROSE)
    with pytest.raises(UserError, match=r"not packed as \.gz"):
        with_kind(SourceSpec(kind="text", path=str(tmp_path / "a.txt.gz")), "x")


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    paths = [str(_spec(tmp_path, "a.txt", PROSE).path), str(_spec(tmp_path, "b.jsonl", LINES).path)]
    with pytest.raises(UserError, match=r"x\.path names files of several kinds"):
        with_kind(SourceSpec(kind="auto", path=paths), "x")


def test_kind_found_is_the_kind_read(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "b")
    assert read_documents(SourceSpec(kind="auto", path=str(tmp_path / "b")), "x")["text"][:] == ["one", "two"]
    assert read_documents(_spec(tmp_path, "a.jsonl.bz2", LINES), "x")["text"][:] == ["one", "two"]
