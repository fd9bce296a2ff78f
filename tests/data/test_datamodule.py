"""Batches for training, validation and calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.data.windows import cut_windows
from usllm.models.random_model import byte_tokenizer
from usllm.system.errors import UserError


def _text(path: Path, name: str, documents: int = 40) -> SourceSpec:
    path.mkdir(exist_ok=True)
    (path / name).write_text("\n\n".join(f"{name} document {number}" for number in range(documents)))
    return SourceSpec(kind="text", path=str(path / name))


def _module(tmp_path: Path, **options: object) -> TextDataModule:
    defaults = {"context_length": 16, "batch_size": 2, "validation_fraction": 0.2, "cache_dir": tmp_path / "cache"}
    train = options.pop("train", None) or _text(tmp_path, "train")
    return TextDataModule(byte_tokenizer(), train, **{**defaults, **options})  # type: ignore[arg-type]


def _attach(
    module: TextDataModule, max_steps: int = 3, accumulate: int = 2, world: int = 1, rank: int = 0, step: int = 0
) -> None:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=max_steps, accumulate_grad_batches=accumulate, world_size=world, global_rank=rank, global_step=step
    )


def test_training_covers_the_whole_run(tmp_path: Path) -> None:
    module = _module(tmp_path)
    _attach(module)
    batches = list(module.train_dataloader())
    assert len(batches) == len(module.train_dataloader()) == 6
    assert {batch["input_ids"].shape for batch in batches} == {(2, 16)}
    assert batches[0]["input_ids"].dtype == torch.int64
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        module = _module(tmp_path, seed=seed)
        _attach(module)
        return next(iter(module.train_dataloader()))["input_ids"]

    torch.manual_seed(1)
    one = first(0)
    torch.manual_seed(2)
    assert torch.equal(first(0), one)
    assert not torch.equal(first(1), one)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_begins_at_the_step_of_the_run_and_keeps_the_length_of_the_whole(
    tmp_path: Path, step: int, num_workers: int
) -> None:
    module = _module(tmp_path, num_workers=num_workers)
    _attach(module)
    whole = [batch["input_ids"] for batch in module.train_dataloader()]
    _attach(module, step=step)
    rest = [batch["input_ids"] for batch in module.train_dataloader()]
    assert len(rest) == len(whole) - 2 * step
    assert len(module.train_dataloader()) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2 * step :], strict=True))


SPLITS = [(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("batch_size", "accumulate", "world"), SPLITS)
def test_every_step_sees_the_same_sequences_however_they_are_split(
    tmp_path: Path, batch_size: int, accumulate: int, world: int, step: int
) -> None:
    def rows(batch_size: int, accumulate: int, world: int, step: int) -> list[list[tuple[int, ...]]]:
        """The sequences of each step from ``step`` on, sorted."""
        per_rank = []
        for rank in range(world):
            module = _module(tmp_path, batch_size=batch_size)
            _attach(module, 3, accumulate, world, rank, step)
            batches = [batch["input_ids"].tolist() for batch in module.train_dataloader()]
            starts = range(0, len(batches), accumulate)
            per_rank.append([[row for batch in batches[i : i + accumulate] for row in batch] for i in starts])
        return [sorted(tuple(row) for rank in parts for row in rank) for parts in zip(*per_rank, strict=True)]

    assert rows(batch_size, accumulate, world, step) == rows(4, 1, 1, 0)[step:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_validate_each_sequence_once_in_equally_many_batches(tmp_path: Path, world: int) -> None:
    counted, batches = [], set()
    for rank in range(world):
        module = _module(tmp_path)
        _attach(module, world=world, rank=rank)
        loader = module.val_dataloader()
        batches.add(len(list(loader)))
        labels = torch.cat([batch["labels"] for batch in loader])
        inputs = torch.cat([batch["input_ids"] for batch in loader])
        filler = (labels == -100).all(1)
        assert torch.equal(labels[~filler], inputs[~filler])
        counted += labels[~filler].tolist()
    assert len(batches) == 1
    assert sorted(counted) == sorted(module.validation_sequences["input_ids"][:])


def test_without_steps_there_is_no_order(tmp_path: Path) -> None:
    module = _module(tmp_path)
    _attach(module, max_steps=-1)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        module.train_dataloader()


def test_validation_holds_other_documents_than_training(tmp_path: Path) -> None:
    module = _module(tmp_path)
    tokenizer = module.tokenizer

    def documents(rows: list[list[int]]) -> set[str]:
        stream = tokenizer.decode([token for row in rows for token in row])
        return set(stream.split(tokenizer.eos_token)[:-1])

    train = documents(module.train_sequences["input_ids"][:])
    validation = documents(module.validation_sequences["input_ids"][:])
    assert train.isdisjoint(validation)
    assert len(validation) >= 7  # a fifth of 40, less what the remainder cut off


def test_split_is_the_same_for_every_seed(tmp_path: Path) -> None:
    tokens = [_module(tmp_path, seed=seed).validation_tokens() for seed in range(2)]
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0].shape == (len(_module(tmp_path).validation_sequences) * 16,)


def test_validation_source_is_used_where_given(tmp_path: Path) -> None:
    module = _module(tmp_path, validation=_text(tmp_path, "held"))
    assert module.tokenizer.decode(module.validation_tokens()).startswith("held document 0")
    _attach(module)
    rows = torch.cat([batch["input_ids"] for batch in module.val_dataloader()])
    assert torch.equal(rows.flatten(), module.validation_tokens())


def test_every_sequence_begins_alike_in_training_validation_and_calibration(tmp_path: Path) -> None:
    module = _module(tmp_path, window_start="each")
    _attach(module)
    start = module.tokenizer.bos_token_id
    for batches in (module.train_dataloader(), module.val_dataloader(), module.calibration_batches(5)):
        assert {int(first) for batch in batches for first in batch["input_ids"][:, 0]} == {start}


def test_validation_tokens_cut_again_are_the_validation_sequences(tmp_path: Path) -> None:
    module = _module(tmp_path, window_start="each")
    start = module.tokenizer.bos_token_id
    windows, _ = cut_windows(module.validation_tokens().numpy(), 16, start)
    assert windows.tolist() == module.validation_sequences["input_ids"][:]


def test_rule_of_a_family_needs_the_family(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="window_start=auto: needs the model's family"):
        _module(tmp_path, window_start="auto")


def test_validation_does_not_touch_the_global_rng(tmp_path: Path) -> None:
    module = _module(tmp_path)
    _attach(module)
    before = torch.get_rng_state()
    list(module.val_dataloader())
    list(module.calibration_batches(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_calibration_sees_what_training_sees_first(tmp_path: Path) -> None:
    module = _module(tmp_path)
    _attach(module)
    trained = torch.cat([batch["input_ids"] for batch in module.train_dataloader()])
    calibrated = torch.cat([batch["input_ids"] for batch in module.calibration_batches(5)])
    assert torch.equal(calibrated, trained[:5])


def test_calibration_repeats_nothing_when_there_is_too_little(tmp_path: Path) -> None:
    module = _module(tmp_path)
    rows = torch.cat([batch["input_ids"] for batch in module.calibration_batches(10_000)])
    assert len(rows) == len(module.train_sequences)


def test_steps_of_a_pass_are_rounded_up(tmp_path: Path) -> None:
    module = _module(tmp_path)
    count = len(module.train_sequences)
    assert module.steps_for(1, accumulate_grad_batches=2) == -(-count // 4)
    assert module.steps_for(3) == -(-3 * count // 2)
    assert module.steps_for(0.0001) == 1


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    module = _module(tmp_path, train=_text(tmp_path, "single", documents=1))
    with pytest.raises(UserError, match=r"one document.*data\.validation"):
        module.setup()


def test_too_short_held_out_text_names_the_fraction(tmp_path: Path) -> None:
    module = _module(tmp_path, validation_fraction=0.02, context_length=64)
    with pytest.raises(UserError, match=r"data\.validation holds.*data\.validation_fraction"):
        module.setup()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_impossible_fraction_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError, match=r"data\.validation_fraction"):
        _module(tmp_path, validation_fraction=fraction).setup()


def test_only_the_first_sequences_are_trained_on_where_asked_for(tmp_path: Path) -> None:
    whole, few = _module(tmp_path), _module(tmp_path, max_sequences=3)
    assert few.train_sequences["input_ids"][:] == whole.train_sequences["input_ids"][:3]
    assert torch.equal(few.validation_tokens(), whole.validation_tokens())
    assert few.steps_for(4) == 6
    assert len(_module(tmp_path, max_sequences=10_000).train_sequences) == len(whole.train_sequences)
