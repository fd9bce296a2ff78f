"""A streamed run goes on where it stopped, bit for bit, and takes the same sequences however it is split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.data.sources import MixedSource
from usllm.data.streaming.lanes import LANES, Lanes
from usllm.data.streaming.loader import CHUNK
from usllm.models.random_model import byte_tokenizer
from usllm.system.errors import RunError

TEXT = "the cat sat on a mat while seven dogs ran over green hills and sang of rivers that bend"


def shards(folder: Path, count: int = 5, documents: int = 60) -> SourceSpec:
    """JSON lines of documents of very unequal lengths, each with its name in front."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for shard in range(count):
        lines = []
        for number in range(documents):
            words = draw.choices(TEXT.split(), k=int(draw.paretovariate(1.1)) % 200)
            lines.append(json.dumps({"text": f"<{shard}.{number}> {' '.join(words)}"}))
        (folder / f"{shard:03d}.jsonl").write_text("\n".join(lines) + "\n")
    return SourceSpec(kind="jsonl", path=str(folder / "*.jsonl"), streaming=True)


def module(tmp_path: Path, source: SourceSpec | None = None, **options: Any) -> TextDataModule:
    defaults = {"context_length": 16, "batch_size": 2, "cache_dir": tmp_path / "cache", "validation_documents": 5}
    defaults |= {"shuffle_buffer": 32}
    return TextDataModule(byte_tokenizer(), source or shards(tmp_path / "shards"), **{**defaults, **options})


def attach(data: TextDataModule, steps: int, step: int = 0, accumulate: int = 2, rank: int = 0, world: int = 1) -> Any:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=steps, accumulate_grad_batches=accumulate, world_size=world, global_rank=rank, global_step=step
    )
    return data.train_dataloader()


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def steps_of(loader: Any, accumulate: int = 2) -> list[list[list[int]]]:
    """The sequences of each step."""
    batches = [batch["input_ids"].tolist() for batch in loader]
    return [joined(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)]


def kept(data: TextDataModule, step: int) -> dict[str, Any]:
    """What a checkpoint of a step holds, as it is read from a file."""
    data.trainer.global_step = step  # type: ignore[union-attr, misc]
    return json.loads(json.dumps(data.state_dict()))


STEPS = 3 * LANES // 4  # every lane three times


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("killed", [1, CHUNK // 4 - 1, CHUNK // 4, 30, 77, STEPS - 1])
def test_killed_run_takes_the_sequences_that_it_would_have_taken(tmp_path: Path, workers: int, killed: int) -> None:
    first = module(tmp_path, num_workers=workers)
    batches = iter(attach(first, STEPS))
    for _ in range(2 * killed):
        next(batches)
    saved = kept(first, killed)
    del batches

    whole = steps_of(attach(module(tmp_path), STEPS))
    again = module(tmp_path, num_workers=workers)
    again.load_state_dict(saved)
    rest = steps_of(attach(again, STEPS, step=killed))
    assert rest == whole[killed:]
    assert len({tuple(row) for step in whole for row in step}) > 0.9 * 4 * STEPS  # they do differ


def test_checkpoints_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path: Path) -> None:
    def saved_at(step: int, state: dict[str, Any] | None, begin: int, workers: int) -> dict[str, Any]:
        data = module(tmp_path, num_workers=workers)
        if state is not None:
            data.load_state_dict(state)
        batches = iter(attach(data, STEPS, step=begin))
        for _ in range(2 * (step - begin)):
            next(batches)
        return kept(data, step)

    whole = saved_at(100, None, 0, 0)
    assert saved_at(100, saved_at(41, None, 0, 2), 41, 0) == whole
    assert saved_at(100, saved_at(40, None, 0, 0), 40, 2) == whole
    assert saved_at(60, saved_at(18, None, 0, 0), 18, 0) == saved_at(60, None, 0, 2)  # lanes drawn once or twice


def test_training_that_ends_within_a_long_accumulation_is_saved_at_its_last_whole_step(tmp_path: Path) -> None:
    """As the end of training does, after a limit of time or an early stop: 31 micro batches of the second step made."""
    first = module(tmp_path, batch_size=8)
    batches = iter(attach(first, 3, accumulate=32))
    for _ in range(63):
        next(batches)
    assert 4 * CHUNK < 31 * 8
    saved = kept(first, 1)
    whole = steps_of(attach(module(tmp_path, batch_size=8), 3, accumulate=32), 32)
    again = module(tmp_path, batch_size=8)
    again.load_state_dict(saved)
    assert steps_of(attach(again, 3, step=1, accumulate=32), 32) == whole[1:]


SPLITS = [(1, 2, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1)]


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), SPLITS)
def test_every_step_sees_the_same_sequences_however_they_are_split(
    tmp_path: Path, batch_size: int, accumulate: int, world: int
) -> None:
    ranks = []
    for rank in range(world):
        data = module(tmp_path, batch_size=batch_size)
        ranks.append(steps_of(attach(data, 60, accumulate=accumulate, rank=rank, world=world), accumulate))
    found = [sorted(joined(parts)) for parts in zip(*ranks, strict=True)]
    assert found == [sorted(step) for step in steps_of(attach(module(tmp_path), 60))]


def stopped(ranks: list[TextDataModule], step: int) -> tuple[TextDataModule, list[list[list[int]]], list[Any]]:
    """One of the ranks that stopped behind a step of 4 sequences, and by rank its sequences and positions."""
    rows: list[list[list[int]]] = []
    positions: list[Any] = []
    for rank, data in enumerate(ranks):
        batches = iter(attach(data, STEPS, accumulate=4 // len(ranks), rank=rank, world=len(ranks)))
        rows.append([next(batches)["input_ids"][0].tolist() for _ in range(step * 4 // len(ranks))])
        loader = data._training._loader
        assert loader is not None
        positions.append(loader.positions(step * loader.per_step))
    return ranks[-1], rows, positions


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_run_goes_on_over_another_number_of_ranks(
    tmp_path: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 57
    monkeypatch.setattr("usllm.data.training_text.gathered", lambda mine: positions)
    data, _, positions = stopped([module(tmp_path, batch_size=1) for _ in range(before)], killed)
    saved = kept(data, killed)
    found = []
    for rank in range(after):
        again = module(tmp_path, batch_size=1)
        again.load_state_dict(saved)
        loader = attach(again, STEPS, step=killed, accumulate=4 // after, rank=rank, world=after)
        found.append(steps_of(loader, 4 // after))
    merged = [sorted(joined(parts)) for parts in zip(*found, strict=True)]
    assert merged == [sorted(step) for step in steps_of(attach(module(tmp_path), STEPS))[killed:]]


def test_held_out_documents_and_their_copies_are_never_trained_on(tmp_path: Path) -> None:
    source = shards(tmp_path / "shards")
    first = (tmp_path / "shards" / "000.jsonl").read_text().splitlines()[:5]
    with (tmp_path / "shards" / "003.jsonl").open("a") as file:
        file.write("\n".join(first) + "\n")
    data = module(tmp_path, source)
    stream = data.tokenizer.decode([t for step in steps_of(attach(data, STEPS)) for row in step for t in row])
    assert "<0.5>" in stream
    assert not any(f"<0.{number}>" in stream for number in range(5))
    assert data.stream_facts()["data.train"]["skipped"]["held_out"] >= 10
    assert "<0.0>" in data.tokenizer.decode(data.validation_tokens())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_and_packed_texts_take_turns_by_their_shares_and_resume(tmp_path: Path, workers: int) -> None:
    (tmp_path / "packed.txt").write_text("\n\n".join(f"PACKED {number} text" for number in range(40)))
    packed = MixedSource(kind="text", path=str(tmp_path / "packed.txt"), share=0.25)
    other = MixedSource(kind="jsonl", path=str(tmp_path / "other" / "*.jsonl"), share=0.25, streaming=True)
    shards(tmp_path / "other", count=2)

    def mixed() -> TextDataModule:
        return module(tmp_path, mixture={"packed": packed, "other": other}, num_workers=workers)

    first = mixed()
    whole = steps_of(attach(first, 90))
    rows = [row for step in whole for row in step]
    tables = {tuple(row) for row in first._training.parts[1]["input_ids"][:]}  # type: ignore[index]
    assert abs(sum(tuple(row) in tables for row in rows) - len(rows) // 4) <= 1
    batches = iter(attach(first, 90))
    for _ in range(2 * 37):
        next(batches)
    saved = kept(first, 37)
    again = mixed()
    again.load_state_dict(saved)
    assert steps_of(attach(again, 90, step=37)) == whole[37:]


def test_calibration_sees_what_training_sees_first(tmp_path: Path) -> None:
    data = module(tmp_path)
    trained = torch.cat([batch["input_ids"] for batch in attach(data, 10)])
    calibrated = torch.cat([batch["input_ids"] for batch in data.calibration_batches(7)])
    assert torch.equal(calibrated, trained[:7])


@pytest.mark.parametrize("rule", ["none", "each"])
def test_sequences_begin_as_their_rule_says_also_after_a_resume(tmp_path: Path, rule: str) -> None:
    def data() -> TextDataModule:
        return module(tmp_path, window_start=rule)

    first = data()
    whole = steps_of(attach(first, 60))
    again = data()
    state = kept(first, 60)
    again.load_state_dict(state)
    attach(first, 90)
    rest = steps_of(attach(again, 90, step=60))
    assert rest == steps_of(attach(data(), 90))[60:]
    starts = {row[0] for step in whole + rest for row in step}
    assert (starts == {first.tokenizer.bos_token_id}) == (rule == "each")


@pytest.mark.parametrize(("buffer", "compared"), [(32, 32), (4096, None)])
def test_test_sets_are_compared_with_all_of_a_corpus_that_fits_a_window(
    tmp_path: Path, buffer: int, compared: int | None
) -> None:
    data = module(tmp_path, shuffle_buffer=buffer)
    data.setup()
    assert data.compared == {"data.train": compared}


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = steps_of(attach(module(tmp_path), 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert steps_of(attach(module(tmp_path), 5)) == one
    assert steps_of(attach(module(tmp_path, seed=1), 5)) != one


class _LostError(RunError):
    """One with more than a message."""

    def __init__(self, server: str, tries: int) -> None:
        super().__init__(server, tries)
        self.server, self.tries = server, tries


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_worker_arrives_as_what_it_was(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lanes: Lanes, number: int) -> None:
        raise _LostError("far away", 3)

    data = module(tmp_path, num_workers=workers)
    data.setup()
    monkeypatch.setattr(Lanes, "sequence", fails)
    with pytest.raises(_LostError) as raised:
        next(iter(attach(data, 3)))
    assert (raised.value.server, raised.value.tries) == ("far away", 3)


def test_the_end_of_a_corpus_is_said(tmp_path: Path) -> None:
    data = module(tmp_path, shards(tmp_path / "few", count=1, documents=30))
    with pytest.warns(UserWarning, match=r"data\.train: the corpus has ended, and pass \d+ begins"):
        list(attach(data, 100))
    assert data.stream_facts()["data.train"]["passes"] >= 1
