"""DDP and FSDP2 on two processes: the run of one process, resumed on as many ranks and on another number."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Settings, differences, final_checkpoint, record

# Steps of 4 sequences, states projected every other step, allocated anew after step 4, gradients shared by the members
# of buckets, which a shard's edges cut. No dropout: the masks of two ranks are not those of one process.
SHARED = {"bits_per_weight": 2.0, "rows": 2, "group_size": 32, "straight_through": "state"}
ONE = Settings(project_every=2, reallocate_every=4, dropout=0.0, sketch=SHARED)
SPLIT = replace(ONE, batch_size=1, ranks=2)
DDP = replace(SPLIT, strategy="ddp")
FSDP2 = replace(SPLIT, strategy="fsdp2")
ACCUMULATED = replace(ONE, batch_size=1, accumulate=4, validate_every=8)
DISTILLED = {
    "objective": {"name": "distill", "hidden_weight": 0.5, "cross_entropy_weight": 0.5},
    "gradient_checkpointing": True,
    "tied": False,
}
KILLED = {"kill_at": ("on_train_batch_start", 8), "sigkill": True}
"""After the checkpoint of step 2, inside the accumulation of step 4."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the run that was never killed, made once per settings."""
    root = tmp_path_factory.mktemp("runs")
    known: dict[str, Path] = {}

    def get(settings: Settings) -> Path:
        key = repr(settings)
        if key not in known:
            known[key] = root / f"run{len(known)}"
            run(known[key], settings)
        return known[key]

    return get


def run(folder: Path, settings: Settings) -> None:
    if settings.ranks > 1:
        assert tiny_run.run_on_ranks(folder, settings) == [0] * settings.ranks
    else:
        tiny_run.run(folder, settings)


def killed(folder: Path, settings: Settings) -> None:
    """Leave in ``folder`` what a run leaves whose processes are all killed."""
    codes = tiny_run.run_on_ranks(folder, replace(settings, **KILLED))  # type: ignore[arg-type]
    assert codes == [-9] * settings.ranks
    assert not (folder / "checkpoints" / "step=00000006.ckpt").exists()


def assert_equal_to_rounding(expected: Path, found: Path) -> None:
    """Latents, E[a²] and the optimizer's moments; plans and the integers of the states exactly."""
    a, b = final_checkpoint(expected), final_checkpoint(found)
    assert a["global_step"] == b["global_step"]
    assert not differences(a["usllm"]["plans"], b["usllm"]["plans"])
    assert a["lr_schedulers"] == b["lr_schedulers"]
    # A step of Adam is up to lr = 1e-3 long, also where a gradient is little more than rounding.
    torch.testing.assert_close(b["state_dict"], a["state_dict"], rtol=1e-4, atol=2e-5)
    assert a["optimizer_states"][0]["param_groups"] == b["optimizer_states"][0]["param_groups"]
    torch.testing.assert_close(
        b["optimizer_states"][0]["state"], a["optimizer_states"][0]["state"], rtol=1e-4, atol=1e-7
    )


def assert_same_losses(expected: Path, found: Path, ranks: int) -> None:
    """Training losses, as means over ranks, and validation losses, which every rank reports for all."""
    parts = [rank_record(found, rank) for rank in range(ranks)]
    for (kind, position), value in record(expected).items():
        theirs = [part[kind, position] for part in parts]
        if kind == "validation":
            assert set(theirs) == {theirs[0]}
            assert float.fromhex(theirs[0]) == pytest.approx(float.fromhex(value), rel=1e-5)
        else:
            loss = sum(float.fromhex(one) for one, _ in theirs) / ranks
            assert loss == pytest.approx(float.fromhex(value[0]), rel=1e-5)
            assert sorted(row for _, rows in theirs for row in rows) == sorted(value[1])


def rank_record(folder: Path, rank: int) -> dict[tuple[str, int], Any]:
    """What one rank recorded."""
    return record(folder, "record.jsonl" if rank == 0 else f"record.jsonl.{rank}")


@pytest.mark.parametrize("settings", [pytest.param(DDP, marks=pytest.mark.slow), FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(settings: Settings, finished: Any) -> None:
    assert_equal_to_rounding(finished(ONE), finished(settings))
    assert_same_losses(finished(ONE), finished(settings), 2)


@pytest.mark.slow
def test_sharded_distillation_with_recomputed_activations_trains_as_one_process_does(finished: Any) -> None:
    # Micro batches of one sequence in both: the floor of the hidden term is a share of the micro batch's median.
    one, two = replace(ACCUMULATED, **DISTILLED), replace(FSDP2, **DISTILLED)  # type: ignore[arg-type]
    assert_equal_to_rounding(finished(one), finished(two))


def test_sharded_run_killed_and_resumed_is_equal_bit_for_bit_and_on_one_process_to_rounding(
    finished: Any, tmp_path: Path
) -> None:
    killed(tmp_path / "run", FSDP2)
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "alone" / "checkpoints")
    run(tmp_path / "run", FSDP2)
    for rank in range(2):
        assert rank_record(tmp_path / "run", rank) == rank_record(finished(FSDP2), rank)
    assert not differences(final_checkpoint(finished(FSDP2)), final_checkpoint(tmp_path / "run"))
    run(tmp_path / "alone", ACCUMULATED)
    assert_equal_to_rounding(finished(ONE), tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_run_of_one_process_is_continued_on_two(settings: Settings, finished: Any, tmp_path: Path) -> None:
    killed(tmp_path / "run", replace(ACCUMULATED, checkpoint_every=1))
    run(tmp_path / "run", settings)
    assert_equal_to_rounding(finished(ONE), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_run_with_dropout_is_resumed_equal_on_as_many_ranks(settings: Settings, finished: Any, tmp_path: Path) -> None:
    settings = replace(settings, dropout=0.2)
    killed(tmp_path / "run", settings)
    run(tmp_path / "run", settings)
    for rank in range(2):
        assert rank_record(tmp_path / "run", rank) == rank_record(finished(settings), rank)
    assert not differences(final_checkpoint(finished(settings)), final_checkpoint(tmp_path / "run"))
