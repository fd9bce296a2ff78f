"""A pass over a corpus trains on each document once, in one process and over a kill that changes their number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_stream import STEPS, attach, joined, kept, module, shards, steps_of, stopped

from usllm.data.streaming.lanes import LANES
from usllm.models.random_model import byte_tokenizer

MANY = 20
"""Shards of more text than a run of ``STEPS`` takes."""


def test_a_pass_holds_each_document_once_in_another_order_than_the_next(tmp_path: Path) -> None:
    data = module(tmp_path)
    windows = data._training.parts[0].corpus.windows()  # type: ignore[union-attr]
    turns: dict[int, list[str]] = {0: [], 1: [], 2: []}
    while (window := next(windows)).turn < 3:
        turns[window.turn] += [text.split()[0] for text in window.texts]
    held_out = {f"<0.{number}>" for number in range(5)}
    everything = {f"<{shard}.{number}>" for shard in range(5) for number in range(60)}
    for turn in turns.values():
        assert Counter(turn) == Counter(everything - held_out)
    assert turns[0] != turns[1] != turns[2]


def documents(rows: list[list[int]], folder: Path) -> Counter[str]:
    """How often each document lies whole in the lanes of a run's sequences; none of them is in no file."""
    tokenizer = byte_tokenizer()
    streams = [tokenizer.decode(joined(rows[lane::LANES])) for lane in range(LANES)]
    found = [text for stream in streams for text in stream.split(tokenizer.eos_token)[:-1]]
    known = {json.loads(line)["text"] for path in (folder / "shards").iterdir() for line in path.open()}
    assert len(found) > 200
    assert set(found) <= known
    return Counter(text.split()[0] for text in found)


def test_lanes_hold_each_document_of_the_corpus_once_and_nothing_else(tmp_path: Path) -> None:
    data = module(tmp_path, shards(tmp_path / "shards", MANY))
    counts = documents(joined(steps_of(attach(data, STEPS))), tmp_path)
    assert data.stream_facts()["data.train"]["passes"] == 0
    assert max(counts.values()) == 1


def test_no_document_comes_twice_where_a_killed_run_goes_on_over_more_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, source = 57, shards(tmp_path / "shards", MANY)
    monkeypatch.setattr("usllm.data.training_text.gathered", lambda mine: positions)
    data, before, positions = stopped([module(tmp_path, source, batch_size=1) for _ in range(2)], killed)
    saved, after = kept(data, killed), []
    for rank in range(4):
        again = module(tmp_path, source, batch_size=1)
        again.load_state_dict(saved)
        after.append(joined(steps_of(attach(again, STEPS, step=killed, accumulate=1, rank=rank, world=4), 1)))
        assert again.stream_facts()["data.train"]["passes"] == 0
    rows = [row for ranks in (before, after) for places in zip(*ranks, strict=True) for row in places]
    assert len(rows) == 4 * STEPS
    assert max(documents(rows, tmp_path).values()) == 1
