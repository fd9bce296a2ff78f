"""Files that are cut or damaged are named and can be left out, here and behind an address; what is gone never is."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile
from test_rows import TEXTS, corpus_of, lines, passed, texts_of, written

from usllm.data import SourceSpec
from usllm.data.streaming.order import SKIP
from usllm.data.streaming.rows import Bad, read_rows
from usllm.data.streaming.shards import Shard
from usllm.data.streaming.source import open_corpus
from usllm.system.errors import RunError

Placed = Callable[[Path], str]
LINES = lines(*({"text": f"{text} {number * 7919}" * 50} for number, text in enumerate(TEXTS)))


@pytest.fixture(params=["here", "behind an address"])
def placed(request: pytest.FixtureRequest) -> Placed:
    """What is read in place of a path: itself, or the address of a copy."""

    def behind_an_address(path: Path) -> str:
        fsspec.filesystem("memory").pipe(f"/damage/{path.name}", path.read_bytes())
        return f"memory://damage/{path.name}"

    return str if request.param == "here" else behind_an_address


def bad(place: str, kind: str) -> tuple[list[str], list[Bad]]:
    found = [found for _, found in read_rows(Shard(place, kind, 0), SourceSpec(kind=kind))]
    return [each for each in found if isinstance(each, str)], [each for each in found if isinstance(each, Bad)]


def test_broken_line_in_the_middle_is_named_and_the_rest_is_read(placed: Placed, tmp_path: Path) -> None:
    broken = [{"text": "one"}, {"other": "two"}, {"text": 3}, {"text": "nul \x00"}]
    (tmp_path / "a.jsonl").write_bytes(lines(*broken) + b'{"text": "cut\n\xff\n' + lines({"text": "last"}))
    place = placed(tmp_path / "a.jsonl")
    texts, reasons = bad(place, "jsonl")
    assert texts == ["one", "last"]
    words = ["line 2 has no text in 'text'", "line 3 has no text", "line 4 holds a NUL", "line 5 is not JSON", "line 6"]
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason.reason
        assert place in reason.reason
        assert not reason.whole


def test_truncated_packed_file_is_named_with_the_row_that_it_ends_behind(placed: Placed, tmp_path: Path) -> None:
    content = gzip.compress(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) * 2 // 3])
    texts, (reason,) = bad(placed(tmp_path / "a.jsonl.gz"), "jsonl")
    assert 0 < len(texts) < len(TEXTS)
    assert reason.whole
    assert f"behind row {len(texts)}" in reason.reason


def overwritten(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 64 + content[middle + 64 :]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", overwritten(gzip.compress(LINES))),
        ("a.jsonl.gz", gzip.compress(LINES) + b"\x1f\x8bno such member"),
        ("a.jsonl.xz", overwritten(lzma.compress(LINES))),
        ("a.jsonl.xz", lzma.compress(LINES)[:200]),
        ("a.jsonl.bz2", overwritten(bz2.compress(LINES))),
        ("a.jsonl.bz2", bz2.compress(LINES)[:200]),
    ],
    ids=["gz, another byte", "gz, no second member", "xz, another byte", "xz, cut", "bz2, another byte", "bz2, cut"],
)
def test_what_does_not_unpack_is_named(placed: Placed, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    place = placed(tmp_path / name)
    _, (reason,) = bad(place, "jsonl")
    assert reason.whole
    assert reason.reason.startswith(f"{place} cannot be read (")


def test_truncated_parquet_and_other_schemas_are_named(placed: Placed, tmp_path: Path) -> None:
    shard = written(tmp_path / "a.parquet", "parquet", TEXTS)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    for name, words in (
        ("cut", "cannot be read as parquet"),
        ("column", "has no column 'text' but ['body']"),
        ("numbers", "column 'text' holds int64, not text"),
    ):
        texts, (reason,) = bad(placed(tmp_path / f"{name}.parquet"), "parquet")
        assert texts == []
        assert reason.whole
        assert words in reason.reason
    assert texts_of(shard, SourceSpec(kind="parquet")) == TEXTS


def test_damaged_row_group_is_named_with_its_rows_and_the_others_are_read(placed: Placed, tmp_path: Path) -> None:
    shard = written(tmp_path / "a.parquet", "parquet", TEXTS)
    column = pq.ParquetFile(shard.place).metadata.row_group(2).column(0)
    content = bytearray(Path(shard.place).read_bytes())
    begin = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    content[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    Path(shard.place).write_bytes(content)
    texts, (reason,) = bad(placed(tmp_path / "a.parquet"), "parquet")
    assert texts == TEXTS[:6] + TEXTS[9:]
    assert "from row 7 to the end of row group 3" in reason.reason


def test_damaged_files_behind_an_address_are_left_out_and_counted(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/left_out/a.jsonl.gz", gzip.compress(lines(*({"text": text} for text in TEXTS))))
    system.pipe("/left_out/b.jsonl.gz", gzip.compress(LINES)[:100])
    spec = SourceSpec(kind="jsonl", path="memory://left_out/*", streaming=True)
    windows = passed(open_corpus(spec, "data.train", seed=0, shuffle_buffer=8, on_bad=SKIP))
    assert {text for window in windows for text in window.texts} >= set(TEXTS)
    assert windows[-1].after.files == 1
    assert "b.jsonl.gz cannot be read (EOFError" in windows[-1].after.examples[0]


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.parquet"])
def test_local_file_that_disappears_is_never_left_out(name: str, tmp_path: Path) -> None:
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    for each in ("a", "b", "c"):
        path = tmp_path / name.replace("b", each, 1)
        shard = written(path, kind, TEXTS)
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    corpus = corpus_of(tmp_path, SKIP)
    Path(shard.place).unlink()
    with pytest.raises(RunError, match=rf"{shard.place} cannot be read .*No such file"):
        passed(corpus)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("error", [OSError("the line is dead"), ValueError("odd answer"), EOFError("half an answer")])
def test_server_that_fails_within_a_file_is_no_damage(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    content = Path(written(tmp_path / name, kind, TEXTS).place).read_bytes()
    fsspec.filesystem("memory").pipe(f"/dead/{name}", gzip.compress(content) if name.endswith("gz") else content)
    spec = SourceSpec(kind=kind, path=f"memory://dead/{name}", streaming=True)
    corpus = open_corpus(spec, "data.train", seed=0, shuffle_buffer=8, on_bad=SKIP)

    def fails(file: MemoryFile, size: Any = -1) -> bytes:
        if file.tell() < len(content) - 2000 or kind == "jsonl":
            raise error
        return super(MemoryFile, file).read(size)

    monkeypatch.setattr(MemoryFile, "read", fails, raising=False)
    with pytest.raises(RunError, match=rf"{name} cannot be read \({type(error).__name__}: {error}"):
        passed(corpus)


def test_disk_that_fails_within_a_row_group_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.parquet", "parquet", TEXTS)
    corpus = corpus_of(tmp_path, SKIP)

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fails)
    with pytest.raises(RunError, match=r"a\.parquet cannot be read .*Input/output error"):
        passed(corpus)
