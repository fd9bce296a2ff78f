"""What of a shard is read, from any place on, and how what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from usllm.data import SourceSpec
from usllm.data.sources import read_documents
from usllm.data.streaming.order import SKIP, Corpus, Window
from usllm.data.streaming.rows import BEGINNING, LONGEST, Place, read_rows
from usllm.data.streaming.shards import Shard, find_shards
from usllm.data.streaming.source import open_corpus
from usllm.system.errors import RunError, UserError

TEXTS = [f"document {number} with some words" for number in range(20)]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def written(path: Path, kind: str, texts: list[str]) -> Shard:
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_bytes(lines(*({"text": text} for text in texts)))
    else:
        path.write_text("\n\n".join(texts))
    return Shard(str(path), kind, path.stat().st_size)


def texts_of(shard: Shard, spec: SourceSpec, start: Place = BEGINNING) -> list[str]:
    found = [text for _, text in read_rows(shard, spec, start)]
    assert all(isinstance(text, str) for text in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("document_start", [None, r"document \d*[05] "])
def test_a_place_gives_its_document_again_and_all_behind_it(
    kind: str, document_start: str | None, tmp_path: Path
) -> None:
    shard, spec = written(tmp_path / "a", kind, TEXTS), SourceSpec(kind=kind, document_start=document_start)
    found = list(read_rows(shard, spec))
    assert len(found) == (4 if document_start and kind != "text" else 20)
    for number, (place, _) in enumerate(found):
        assert texts_of(shard, spec, place) == [text for _, text in found[number:]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("document_start", [None, r"document \d*[05] "])
def test_documents_are_those_of_the_packed_source(kind: str, document_start: str | None, tmp_path: Path) -> None:
    shard = written(tmp_path / "a", kind, TEXTS)
    spec = SourceSpec(kind=kind, path=str(tmp_path / "a"), document_start=document_start, separator="\n")
    assert [text for text in texts_of(shard, spec) if text.strip()] == read_documents(spec, "x")["text"][:]


def test_text_without_a_separator_is_cut_where_a_document_begins_or_by_its_length(tmp_path: Path) -> None:
    articles = [f" = Article {number} = \n" + "a line of it \n" * 9000 for number in range(7)]
    (tmp_path / "a.txt").write_text("".join(articles))
    shard = Shard(str(tmp_path / "a.txt"), "text", 0)
    assert texts_of(shard, SourceSpec(kind="text", document_start="^ = [^=].* = $")) == articles
    pieces = texts_of(shard, SourceSpec(kind="text"))
    assert "".join(pieces) == "".join(articles)
    assert {len(piece) for piece in pieces[:-1]} == {LONGEST}


def test_packed_lines_are_read_from_any_place(tmp_path: Path) -> None:
    content = lines(*({"text": text} for text in TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    shard, spec = Shard(str(tmp_path / "a.jsonl.gz"), "jsonl", 0), SourceSpec(kind="jsonl")
    places = [place for place, _ in read_rows(shard, spec)]
    assert texts_of(shard, spec, places[11]) == TEXTS[11:]


def corpus_of(folder: Path, on_bad: str) -> Corpus:
    spec = SourceSpec(kind="auto", path=str(folder / "*"), streaming=True)
    return open_corpus(spec, "data.train", seed=0, shuffle_buffer=8, on_bad=on_bad)


def passed(corpus: Corpus) -> list[Window]:
    found: list[Window] = []
    for window in corpus.windows():
        if window.turn:
            return found
        found.append(window)
    raise AssertionError("windows end")


def test_bad_rows_are_refused_or_counted(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "good"}) + b"broken\n" + lines({"text": "also good"}))
    with pytest.raises(UserError, match=r"data\.train: .*b\.jsonl, line 2 is not JSON.*data\.on_bad=skip"):
        passed(corpus_of(tmp_path, "raise"))
    windows = passed(corpus_of(tmp_path, SKIP))
    assert sorted(text for window in windows for text in window.texts) == sorted([*TEXTS, "good", "also good"])
    assert windows[-1].after.rows == 1
    assert "b.jsonl, line 2" in windows[-1].after.examples[0]


def test_unreadable_parquet_is_refused_before_anything_is_read_or_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        written(tmp_path / f"{name}.parquet", "parquet", TEXTS)
    content = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(content[:200])
    with pytest.raises(UserError, match=r"data\.train: .*c\.parquet cannot be read as parquet.*data\.on_bad=skip"):
        corpus_of(tmp_path, "raise")
    windows = passed(corpus_of(tmp_path, SKIP))
    assert sum(len(window.texts) for window in windows) == 40
    assert windows[-1].after.files == 1


def test_corpus_of_nothing_but_bad_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(lines({"texts": "good"}))
    with pytest.raises(UserError, match=r"hold no text to train on .*has no text in 'text'"):
        next(corpus_of(tmp_path, SKIP).windows())


@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_windows_are_the_same_from_any_of_them_on(start: int, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        written(tmp_path / f"{name}.jsonl", "jsonl", [f"{name} {text}" for text in TEXTS])
    corpus = corpus_of(tmp_path, "raise")
    windows = list(islice(corpus.windows(), 20))
    assert windows[15].turn > 0
    again = corpus.windows(replace(windows[start], texts=()))
    assert list(islice(again, 20 - start)) == windows[start:]


def test_addresses_are_listed_and_read(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in ("b", "a"):
        shard = written(tmp_path / f"{name}.parquet", "parquet", [f"{name} {text}" for text in TEXTS])
        system.pipe(f"/corpus/{name}.parquet", Path(shard.place).read_bytes())
    system.pipe("/corpus/c.jsonl.gz", gzip.compress(lines(*({"text": text} for text in TEXTS))))
    spec = SourceSpec(kind="parquet", path="memory://corpus/*.parquet", streaming=True)
    shards = find_shards(spec, "data.train")
    assert [shard.place for shard in shards] == ["memory:///corpus/a.parquet", "memory:///corpus/b.parquet"]
    assert texts_of(shards[1], spec, Place(4, 0)) == [f"b {text}" for text in TEXTS[4:]]
    spec = SourceSpec(kind="auto", path="memory://corpus/c.jsonl.gz", streaming=True)
    (shard,) = find_shards(spec, "data.train")
    places = [place for place, _ in read_rows(shard, spec)]
    assert texts_of(shard, spec, places[7]) == TEXTS[7:]
    with pytest.raises(UserError, match=r"data\.train: there is no file memory://none/"):
        find_shards(SourceSpec(kind="jsonl", path="memory://none/*", streaming=True), "data.train")
    with pytest.raises(RunError, match="cannot be read"):
        list(read_rows(Shard("memory:///corpus/gone.parquet", "parquet", 0), spec))


def test_split_of_a_data_set_is_the_files_that_datasets_would_read(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        written(tmp_path / f"{name}.parquet", "parquet", [f"{name} {text}" for text in TEXTS])
    spec = SourceSpec(kind="hub", name=str(tmp_path), streaming=True)
    shards = find_shards(spec, "data.train")
    assert [Path(shard.place).name for shard in shards] == ["train-0.parquet", "train-1.parquet"]
    assert texts_of(shards[0], spec)[0].startswith("train-0 document 0")
    with pytest.raises(UserError, match="there is no such split, but"):
        find_shards(SourceSpec(kind="hub", name=str(tmp_path), split="dev", streaming=True), "data.train")
    with pytest.raises(UserError, match="cannot be found on the Hugging Face hub"):
        find_shards(SourceSpec(kind="hub", name=str(tmp_path / "none"), streaming=True), "data.train")


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "jsonl", TEXTS)
    written(tmp_path / "b.parquet", "parquet", TEXTS)
    with pytest.raises(UserError, match=r"data\.train.*files of several kinds"):
        find_shards(SourceSpec(kind="auto", path=str(tmp_path / "*"), streaming=True), "data.train")
    paths = [str(tmp_path / "a.jsonl"), "memory://corpus/*.jsonl"]
    with pytest.raises(UserError, match="local files or addresses, not both"):
        find_shards(SourceSpec(kind="jsonl", path=paths, streaming=True), "data.train")
