"""Files are the old or the new ones at every instant, and a killed writer leaves nothing behind for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from usllm.system.files import read_json, replacing, write_json, write_text


def test_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half of the new", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_killed_process_left_half_written_is_deleted_by_the_next_writer(tmp_path: Path) -> None:
    (tmp_path / ".report.json.999999999").write_text("half")
    (tmp_path / ".other.json.999999999").write_text("not mine")
    write_json(tmp_path / "report.json", {"a": 1})
    assert read_json(tmp_path / "report.json") == {"a": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.json.999999999", "report.json"]
