"""Lines of finished blocks say who has trained them."""

from __future__ import annotations

import pytest

from usllm.stages.block_progress import BlockProgress

ROW = {"block": 4, "stream_error": 0.05, "increment_error": 0.5, "seconds": 61.0}


def test_blocks_of_an_earlier_call_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with BlockProgress(windows=6, steps=1, shown=True) as progress:
        progress.finished(ROW, before=True)
        progress.finished({**ROW, "block": 5})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block")]
    assert [line.split(", ")[-1] for line in lines] == ["in an earlier call", "61 s"]
    assert [line[:8] for line in lines] == ["block 5:", "block 6:"]
