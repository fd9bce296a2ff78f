"""The whole recipe on two ranks: one process's result, and after a kill in any stage the same bits.

Everything at once: rates by sensitivity, trained scales, reconstruction, and the dense model as teacher of the logits;
on text that was packed before, on a corpus that is streamed, and on conversations, whose targets ranks share unequally.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import chat_run
from commands import Outcome, command, command_on_ranks, killed_after, told
from killing import STAGES
from torch import Tensor

from usllm.training import load_checkpoint

RECIPE = [
    "experiment=tiny",
    "sketch=sign",
    "sketch.bits_per_weight=1.5",
    "allocation.layer_budget=sensitivity",
    *("objective=distill", "objective.kl_weight=1", "objective.hidden_weight=0"),
    *("stages=recipe", "stages.calibrate.sequences=8"),
    *("stages.reconstruct.sequences=8", "stages.reconstruct.batch_size=4", "stages.reconstruct.steps=4"),
    *("stages.reconstruct.warmup_steps=1", "stages.reconstruct.calibration_sequences=4"),
    "stages.reconstruct.save_every_n_steps=1",
    *("trainer.max_steps=6", "callbacks.checkpoint.every_n_train_steps=2"),
    *("reuse_statistics=false", "~callbacks.progress", "logger=csv", "run_dir=run"),
]
STRATEGIES = ("ddp", "fsdp2", "fsdp2_cpu_offload")
IN_THE_FAST_SUITE = {("fsdp2", "equal"), ("ddp", "reconstruct, in a block")}
OFFLOADED = {"finetune"}  # the stages before it are those of fsdp2
STREAMED = {"reconstruct, in a block", "finetune"}  # what reads text in the midst of it
MOST_TURNED = 0.01
"""Share of a tensor's codes that may differ: one at the edge of two may fall to either side."""


def table(*columns: str) -> list[object]:
    """All strategies with all that is done to them, on packed text; the main ones on other text too."""
    found = []
    for strategy in STRATEGIES:
        for column in columns:
            offloads = strategy == "fsdp2_cpu_offload"
            if offloads and column not in {"equal", *OFFLOADED}:
                continue
            marks = [] if (strategy, column) in IN_THE_FAST_SUITE else [pytest.mark.slow]
            found.append(pytest.param(strategy, column, "packed", marks=marks, id=f"{strategy}, {column}"))
            if not offloads and column in {"equal", *STREAMED}:
                for source in ("streamed", "chat"):
                    name = f"{strategy}, {column}, {source}"
                    found.append(pytest.param(strategy, column, source, marks=pytest.mark.slow, id=name))
    return found


@pytest.fixture(scope="module")
def texts(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Where a run's text comes from, as overrides."""
    corpus, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = tiny_text.read_text().split()
    for shard in range(3):
        rows = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 60)))}) for _ in range(80)]
        (corpus / f"{shard}.jsonl").write_text("\n".join(rows) + "\n")
    streamed = ["data=jsonl", f"data.train.path={corpus}/*.jsonl", "data.train.streaming=true"]
    streamed += ["data.shuffle_buffer=32", "data.validation_documents=10"]
    talking = chat_run(tmp_path_factory.mktemp("chat"), words)
    return {"packed": [f"data.train.path={tiny_text}"], "streamed": streamed, "chat": talking}


@pytest.fixture(scope="module")
def whole(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a run that nobody killed, by strategy and text, made when it is asked for; ``one``: of one process."""
    known: dict[tuple[str, str], Path] = {}

    def get(strategy: str, source: str) -> Path:
        key = strategy, source
        if key not in known:
            known[key] = tmp_path_factory.mktemp(f"{strategy}_{source}")
            if strategy == "one":
                done = [command("train", *RECIPE, *texts[source], folder=known[key])]
            else:
                done = on_two(texts[source], known[key], strategy)
            assert [status for status, _ in done] == [0] * len(done), told(done)
        return known[key]

    return get


def on_two(text: list[str], folder: Path, strategy: str, *more: str, **options: Any) -> list[Outcome]:
    two = ["trainer.devices=2", f"trainer.strategy={strategy}", "data.batch_size=1"]
    return command_on_ranks("train", *RECIPE, *text, *two, *more, folder=folder, **options)


def final(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_checkpoint(folder / "run" / "checkpoints" / "step=00000006.ckpt")["state_dict"]
    return found


def perplexities(folder: Path) -> list[float]:
    (row,) = json.loads((folder / "run" / "report.json").read_text())["perplexity"]
    return [row[stage] for stage in ("dense", "sketched", "reconstructed", "finetuned")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy, column, source", table("equal"))
def test_two_ranks_give_what_one_process_gives(strategy: str, column: str, source: str, whole: Any) -> None:
    expected, found = final(whole("one", source)), final(whole(strategy, source))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert (found[name] != value).float().mean() <= MOST_TURNED, name
    assert perplexities(whole(strategy, source)) == pytest.approx(perplexities(whole("one", source)), rel=1e-4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy, place, source", table(*STAGES))
def test_ranks_killed_in_a_stage_continue_bit_for_bit(
    strategy: str, place: str, source: str, whole: Any, texts: dict[str, list[str]], tmp_path: Path
) -> None:
    text = texts[source]
    killed = on_two(text, tmp_path, strategy, before=killed_after(*STAGES[place]))
    assert killed[0].status == -signal.SIGKILL, told(killed)
    assert killed[1].status != 0
    resumed = on_two(text, tmp_path, strategy, "resume=true")
    assert [status for status, _ in resumed] == [0, 0], told(resumed)
    ours, theirs = final(tmp_path), final(whole(strategy, source))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert perplexities(tmp_path) == perplexities(whole(strategy, source))
