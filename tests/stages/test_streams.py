"""Streams in files: what is written is read, and nothing is left of them."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from usllm.stages.streams import StreamFiles


def mapped(folder: Path) -> int:
    """Files of a folder that this process has mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_streams_hold_what_is_written_and_leave_nothing(tmp_path: Path) -> None:
    room = StreamFiles(tmp_path / "streams")
    first, second = room((2, 3, 4), torch.bfloat16), room([2, 3, 4], torch.float32)
    first[1], second[0] = 1.5, 2.5
    assert first.shape == second.shape == (2, 3, 4)
    assert first.sum() == 18 and second.sum() == 30  # zeros elsewhere, and no memory in common
    assert list((tmp_path / "streams").iterdir()) == []
    assert mapped(tmp_path) == 2
    del first, second
    gc.collect()
    assert mapped(tmp_path) == 0


def test_disk_without_room_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"stream\.") as caught:
        StreamFiles(tmp_path)((2, 3), torch.float32)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
