"""One row a step in ``metrics.csv``, whole, whatever happened to the process that wrote it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from usllm.system import metric_rows
from usllm.system.metric_rows import MetricRows, part_folders, read_rows


def rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Step and values that are there, row by row."""
    found = read_rows(path)
    return [(int(row["step"]), {k: v for k, v in row.items() if v and k != "step"}) for row in found]


def test_all_that_is_logged_of_a_step_is_one_row(tmp_path: Path) -> None:
    written = MetricRows(tmp_path / "metrics.csv")
    written.add(0, {"lr": 0.1})
    written.add(0, {"loss": 2.5, "epoch": 0})
    written.save()
    written.add(0, {"val": 3.0})  # of a row that is on the disk
    written.add(1, {"loss": 2.25})
    written.save()
    assert rows(written.path) == [(0, {"lr": "0.1", "loss": "2.5", "epoch": "0", "val": "3.0"}), (1, {"loss": "2.25"})]


def test_step_that_goes_before_is_written_when_the_next_is_added(tmp_path: Path) -> None:
    written = MetricRows(tmp_path / "metrics.csv")
    for step in range(3):
        written.add(step, {"loss": float(step)})
    assert [step for step, _ in rows(written.path)] == [0, 1]


def test_values_that_are_said_twice_are_written_once(tmp_path: Path) -> None:
    written = MetricRows(tmp_path / "metrics.csv")
    written.add(0, {"loss": 1.0})
    written.save()
    before = written.path.stat()
    written.add(0, {"loss": 1.0})
    written.save()
    assert (written.path.stat().st_ino, written.path.stat().st_size) == (before.st_ino, before.st_size)


def test_later_step_is_appended_and_an_earlier_one_takes_its_place(tmp_path: Path) -> None:
    written = MetricRows(tmp_path / "metrics.csv")
    for step in (0, 5, 7, 3):
        written.add(step, {"loss": step / 2})
        written.save()
    assert [step for step, _ in rows(written.path)] == [0, 3, 5, 7]


def test_resumed_file_has_the_steps_before_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricRows(path)
    for step in range(6):
        first.add(step, {"loss": float(step)})
    first.save()
    path.write_text(path.read_text() + "0,6.1")  # killed while it was appending
    resumed = MetricRows(path)
    resumed.keep_below(4)
    for step in range(4, 8):
        resumed.add(step, {"loss": 10.0 + step})
    resumed.save()
    assert [(step, row["loss"]) for step, row in rows(path)] == [
        *((step, f"{step}.0") for step in range(4)),
        *((step, f"{10 + step}.0") for step in range(4, 8)),
    ]


def test_row_that_was_cut_is_not_continued_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n1.5,0\n2.")
    written = MetricRows(path)
    written.add(1, {"loss": 3.0})
    written.save()
    assert rows(path) == [(0, {"loss": "1.5"}), (1, {"loss": "3.0"})]


def test_parts_of_older_versions_become_one_file(tmp_path: Path) -> None:
    texts = ["loss,lr,step\n,0.1,0\n1.0,,0\n,0.1,1\n2.0,,1\n", "loss,step,val\n20.0,1,\n30.0,2,\n,2,9.0\n40.0,3,\n"]
    for number, text in enumerate(texts):
        folder = tmp_path / "csv" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(text)
    one, other = (folder / "metrics.csv" for folder in part_folders(tmp_path))
    MetricRows(one).keep_below(3, [other])
    assert rows(one) == [
        (0, {"loss": "1.0", "lr": "0.1"}),
        (1, {"loss": "20.0", "lr": "0.1"}),
        (2, {"loss": "30.0", "val": "9.0"}),
    ]
    assert not other.exists()


def test_full_disk_leaves_whole_rows_and_what_waits_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = MetricRows(tmp_path / "metrics.csv")
    written.add(0, {"loss": 1.0})
    written.save()
    before = written.path.read_bytes()

    class Full:
        """A file on a disk with room for five bytes."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = open(*arguments, **options)  # noqa: SIM115 (closed as it is itself)

        def write(self, content: bytes) -> int:
            if len(content) > 5:
                return self.file.write(content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    written.add(1, {"loss": 2.0})
    with monkeypatch.context() as patch:
        patch.setattr(metric_rows, "open", Full, raising=False)
        with pytest.raises(OSError, match=r"metrics\.csv"):
            written.save()
    assert written.path.read_bytes() == before
    written.save()
    assert rows(written.path) == [(0, {"loss": "1.0"}), (1, {"loss": "2.0"})]
