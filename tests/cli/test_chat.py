"""Runs on conversations: what is learnt, by whom it is seen, killed, resumed, mixed, and block by block."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import chat_run
from commands import Outcome, command, killed_after
from safetensors import safe_open

from usllm.training import load_checkpoint

SETTINGS = [
    *("experiment=tiny", "data.batch_size=2", "run_dir=run", "~callbacks.progress", "logger=csv"),
    *("callbacks.checkpoint.every_n_train_steps=2", "reuse_statistics=false"),
]
RECONSTRUCT = [
    *("stages=[default,reconstruct]", "stages.reconstruct.sequences=8", "stages.reconstruct.batch_size=2"),
    *("stages.reconstruct.steps=4", "stages.reconstruct.warmup_steps=1", "stages.reconstruct.calibration_sequences=4"),
    "stages.reconstruct.save_every_n_steps=1",
]


@pytest.fixture(scope="module")
def chat(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return chat_run(tmp_path_factory.mktemp("chat"), tiny_text.read_text().split())


def train(chat: list[str], folder: Path, *more: str, **options: Any) -> Outcome:
    return command("train", *SETTINGS, *chat, *more, folder=folder, **options)


def final(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(folder / "run" / "checkpoints" / f"step={step:08}.ckpt")[
        "state_dict"
    ]
    return found


def test_run_on_conversations_is_killed_continues_and_is_exported_with_its_template(
    chat: list[str], tmp_path: Path
) -> None:
    whole, folder, few = tmp_path / "whole", tmp_path / "killed", ["trainer.max_steps=6", *RECONSTRUCT]
    done = train(chat, whole, *few)
    assert done.status == 0, done.output
    assert "does not keep apart" not in done.output
    killed = train(
        chat, folder, *few, before=killed_after("usllm.training.module", "SketchFinetuner.on_train_batch_end", 5)
    )
    assert killed.status == -signal.SIGKILL, killed.output
    resumed = train(chat, folder, *few, "resume=true")
    assert resumed.status == 0, resumed.output
    ours, theirs = final(folder), final(whole)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    refused = train(chat, folder, *few, "data.loss_on=all", "resume=true")
    assert refused.status == 2 and "data.loss_on: assistant in the" in refused.output, refused.output
    exported = command("export", "ckpt=run", "out=packed", folder=folder)
    assert exported.status == 0, exported.output
    assert (folder / "packed" / "chat_template.jinja").is_file()


def test_steps_do_not_depend_on_how_their_conversations_are_shared_out(chat: list[str], tmp_path: Path) -> None:
    """Micro batches have unequal shares of a step's targets."""
    steps = ["trainer.max_steps=6", "stages=default", "evaluation.precision=fp32"]
    splits = {"one": ["data.batch_size=4"], "four": ["data.batch_size=1", "trainer.accumulate_grad_batches=4"]}
    for name, split in splits.items():
        done = train(chat, tmp_path / name, *steps, *split)
        assert done.status == 0, done.output
    ours, theirs = final(tmp_path / "one"), final(tmp_path / "four")
    for key, value in theirs.items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_plain_text_may_be_mixed_in(chat: list[str], tiny_text: Path, tmp_path: Path) -> None:
    text = [f"+data.mixture.text.{key}" for key in ("kind=text", f"path={tiny_text}", "share=0.25")]
    for name, streaming in (("packed", "false"), ("streamed", "true")):
        more = [*text, f"+data.mixture.text.streaming={streaming}", "trainer.max_steps=4", *RECONSTRUCT]
        done = train(chat, tmp_path / name, *more)
        assert done.status == 0, done.output


@pytest.mark.slow
def test_blocks_of_a_model_that_is_not_held_are_the_same(chat: list[str], tmp_path: Path) -> None:
    few = ["trainer.max_steps=0", *RECONSTRUCT]
    done = train(chat, tmp_path / "held", *few)
    assert done.status == 0, done.output
    exported = command("export", "ckpt=run", "out=packed", folder=tmp_path / "held")
    assert exported.status == 0, exported.output
    done = train(chat, tmp_path / "blockwise", *few, "block_by_block=true")
    assert done.status == 0, done.output
    found = []
    for place in ("blockwise/run/packed", "held/packed"):
        with safe_open(tmp_path / place / "model.safetensors", framework="pt") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert found[0].keys() == found[1].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


def test_what_the_assistant_says_is_validated(chat: list[str], tmp_path: Path) -> None:
    """The loss of answers that are always the same falls to nothing; questions are drawn at random."""
    path = tmp_path / "same.jsonl"
    rows = [json.loads(line)["messages"][0] for line in Path(chat[2].partition("=")[2]).read_text().splitlines()]
    answer = {"role": "assistant", "content": "yes"}
    path.write_text("".join(json.dumps({"messages": [asked, answer]}) + "\n" for asked in rows))
    losses = {}
    for loss_on in ("assistant", "all"):
        more = [f"data.train.path={path}", f"data.loss_on={loss_on}", "stages=none", "trainer.max_steps=60"]
        more += ["optimizer.lr=3e-3", "trainer.val_check_interval=60", "optimizer.warmup_steps=5"]
        done = train(chat, tmp_path / loss_on, *more)
        assert done.status == 0, done.output
        (log,) = (tmp_path / loss_on / "run" / "csv").rglob("metrics.csv")
        header, *lines = [line.split(",") for line in log.read_text().splitlines()]
        column = header.index("val/loss")
        losses[loss_on] = next(float(line[column]) for line in reversed(lines) if line[column])
    assert losses["assistant"] < 0.2 < 0.5 < losses["all"]
