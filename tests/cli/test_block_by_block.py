"""A run that never holds its model: the same bits as one that does, whatever it is killed in, and a folder like any."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, command, killed_after
from safetensors import safe_open

from usllm.models.random_model import byte_tokenizer, random_config

RECONSTRUCT = [
    "stages=[default,reconstruct]",
    "stages.reconstruct.sequences=4",
    "stages.reconstruct.calibration_sequences=2",
    "stages.reconstruct.batch_size=2",
    "stages.reconstruct.steps=4",
    "stages.reconstruct.warmup_steps=1",
    "stages.reconstruct.save_every_n_steps=1",
    "trainer.max_steps=0",
    "~callbacks.progress",
]
SKETCH = ["sketch=absmaxmin", "sketch.bits_per_weight=1"]
SETTINGS: dict[str, list[str]] = {
    "sketch": SKETCH,
    "importance, dense statistics": [
        *(*SKETCH, "allocation.layer_budget=importance", "stages.reconstruct.statistics=dense"),
        "trainer.precision=bf16-mixed",
    ],
    "windows of two": [*SKETCH, "stages.reconstruct.window=2", "evaluation.batch_size=3"],
    "rounding, in part aimed at increments": ["sketch=rounding", "sketch.bits=2", "stages.reconstruct.recovery=0.5"],
    "littlebit": ["sketch=littlebit", "sketch.bits_per_weight=1.5", "stages.reconstruct.window=2"],
}
KILLS = {
    "in a block": ("usllm.stages.block_state", "BlockStates.save_unfinished", 5),
    "between blocks": ("usllm.stages.block_state", "BlockStates.save_finished", 2),
    "packing": ("usllm.packed.export", "packed_skeleton", 1),
}
BLOCKWISE = ["block_by_block=true"]


def cases(names: Any, fast: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name == fast else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random blocks in several shards, bf16."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = random_config("llama")
    config.num_hidden_layers = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="120KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(model: Path, text: Path, folder: Path, *more: str, **options: Any) -> Outcome:
    given = ["experiment=tiny", f"model={model}", f"data.train.path={text}", "run_dir=run"]
    return command("train", *given, *RECONSTRUCT, *more, folder=folder, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return found


@pytest.mark.parametrize("name", cases(SETTINGS, "sketch"))
def test_blocks_are_those_of_a_run_that_holds_its_model(
    name: str, model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    held, blockwise = tmp_path / "held", tmp_path / "blockwise"
    done = run(model, tiny_text, held, *SETTINGS[name])
    assert done.status == 0, done.output
    exported = command("export", "ckpt=run", "out=packed", folder=held)
    assert exported.status == 0, exported.output
    done = run(model, tiny_text, blockwise, *SETTINGS[name], *BLOCKWISE)
    assert done.status == 0, done.output

    ours, theirs = tensors(blockwise / "run" / "packed"), tensors(held / "packed")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    mine, other = report(blockwise), report(held)
    for stage in ("dense", "finetuned"):
        assert mine["perplexity"][0][stage] == pytest.approx(other["perplexity"][0][stage], rel=1e-3)
    for key in ("bits_per_weight", "bytes", "coverage"):
        assert mine[key] == other[key], key
    assert [row["stream_error"] for row in mine["stages"]["reconstruct"]] == [
        row["stream_error"] for row in other["stages"]["reconstruct"]
    ]
    assert mine["compression"] == other["compression"]


def test_packed_folder_is_like_any_other_and_measures_the_same(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    precise = ["evaluation.precision=fp32", "evaluation.windows=[32]", "evaluation.max_windows=3"]
    sets = ["evaluation.validation_split=false", "+evaluation.test_sets.t.kind=text"]
    sets += [f"+evaluation.test_sets.t.path={tiny_text}", "evaluation.allow_shared=[t]", "evaluation.batch_size=2"]
    done = run(model, tiny_text, tmp_path, *SKETCH, *BLOCKWISE, *precise, *sets)
    assert done.status == 0, done.output
    assert "usllm-inspect model=run/packed" in done.output
    measured = command("eval", "model=run/packed", f"data=[{tiny_text}]", *precise, "run_dir=eval", folder=tmp_path)
    assert measured.status == 0, measured.output
    there = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["perplexity"][0]
    (row,) = report(tmp_path)["perplexity"]
    assert row["windows"] == there["windows"] == 3
    assert row["finetuned"] == pytest.approx(there["perplexity"], rel=2e-3)  # norms are rounded to bf16 there
    refused = command("eval", "ckpt=run", folder=tmp_path)
    assert refused.status == 2 and "its result is model=run/packed" in refused.output, refused.output
    for name, typed in (("inspect", []), ("generate", ["prompt=abc", "max_new_tokens=2"])):
        used = command(name, "model=run/packed", *typed, folder=tmp_path)
        assert used.status == 0, used.output
    card = (tmp_path / "run" / "packed" / "README.md").read_text()
    assert "block_by_block=true" in card and f"{row['finetuned']:.2f}" in card


def test_what_is_left_out_of_a_stream_is_said(model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {number} of some words " * 9}) + "\n" for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows[:20]) + "broken\n" + "".join(rows[20:]))
    given = ["data=jsonl", "data.train.streaming=true", "data.on_bad=skip", "data.validation_documents=8"]
    done = run(model, tmp_path / "a.jsonl", tmp_path, *SKETCH, *BLOCKWISE, *given)
    assert done.status == 0, done.output
    rows_skipped = report(tmp_path)["streams"]["data.train"]["skipped"]["rows"]
    assert rows_skipped >= 1
    assert f"skipped {rows_skipped} rows and 0 files or parts, first: " in done.output


@pytest.mark.parametrize("place", cases(KILLS, "in a block"))
def test_run_killed_anywhere_continues_bit_for_bit(place: str, model: Path, tiny_text: Path, tmp_path: Path) -> None:
    done = run(model, tiny_text, tmp_path / "whole", *SKETCH, *BLOCKWISE)
    assert done.status == 0, done.output
    folder = tmp_path / "killed"
    killed = run(model, tiny_text, folder, *SKETCH, *BLOCKWISE, before=killed_after(*KILLS[place]))
    assert killed.status == -signal.SIGKILL, killed.output
    trained_before = {path: path.stat().st_mtime_ns for path in folder.glob("run/stages/reconstruct/*/window_*.pt")}
    resumed = run(model, tiny_text, folder, *SKETCH, *BLOCKWISE, "resume=true")
    assert resumed.status == 0, resumed.output
    assert {path: path.stat().st_mtime_ns for path in trained_before} == trained_before  # never done again
    ours, theirs = tensors(folder / "run" / "packed"), tensors(tmp_path / "whole" / "run" / "packed")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert list(folder.glob("run/stages/stream.*")) == []
    again = run(model, tiny_text, folder, *SKETCH, *BLOCKWISE, "resume=true")
    assert again.status == 0 and "Perplexity, tiny" in again.output, again.output
    shown = command("report", "runs=run", "out=page", folder=folder)
    assert shown.status == 0, shown.output
