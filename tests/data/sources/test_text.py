"""Text files, packed or not."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from usllm.data import SourceSpec
from usllm.data.sources import read_documents, read_text
from usllm.system.errors import UserError

TEXT = "first\nline\n\nsecond é\n\n\n\n"


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_packed_files_read_as_plain_ones(tmp_path: Path, suffix: str, pack: object) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack(TEXT.encode()))  # type: ignore[operator]
    spec = SourceSpec(kind="text", path=str(path))
    assert read_documents(spec, "data.train")["text"][:] == ["first\nline", "second é"]
    assert read_text(spec, "data.train") == TEXT


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).write_text(f"{name}1\n\n{name}2")
    spec = SourceSpec(kind="text", path=[str(tmp_path / "b"), str(tmp_path / "a")])
    assert read_documents(spec, "data.train")["text"][:] == ["b1", "b2", "a1", "a2"]


def test_windows_line_ends_become_newlines(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\r\nb")
    assert read_text(SourceSpec(kind="text", path=str(tmp_path / "a")), "x") == "a\nb"


def test_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train.*nowhere\.txt"):
        read_documents(SourceSpec(kind="text", path=str(tmp_path / "nowhere.txt")), "data.train")


@pytest.mark.parametrize("read", [read_documents, read_text])
def test_empty_text_is_refused(tmp_path: Path, read: object) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n\n")
    with pytest.raises(UserError, match=r"data\.train.*empty\.txt.*no text"):
        read(SourceSpec(kind="text", path=str(tmp_path / "empty.txt")), "data.train")  # type: ignore[operator]


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_documents(SourceSpec(kind="text", path=str(tmp_path / "a.txt")), "data.train")


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_damaged_packed_file_is_refused(tmp_path: Path, suffix: str, pack: object, kept: float) -> None:
    path = tmp_path / f"text.txt{suffix}"
    whole = pack(b"abc" * 1000)  # type: ignore[operator]
    path.write_bytes(whole[: int(kept * len(whole))] or b"not packed at all")
    with pytest.raises(UserError, match="cannot be read"):
        read_documents(SourceSpec(kind="text", path=str(path)), "data.train")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.test_sets\.mine\.kind='csv'"):
        read_text(SourceSpec(kind="csv"), "evaluation.test_sets.mine")
