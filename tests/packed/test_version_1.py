"""What the last version before packed format 2 wrote goes on: a packed folder, and a checkpoint in the commands."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import usllm
from usllm.packed.folder import open_folder
from usllm.packed.inspection import inspect_folder
from usllm.system.errors import PackedFormatError

WRITTEN = Path(__file__).parents[1] / "fixtures" / "version_1"
CHECKPOINT = "run/checkpoints/step=00000003.ckpt"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files; commands are given in it, as they were then."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


def expected(key: str) -> torch.Tensor:
    return load_file(WRITTEN / "expected.safetensors")[key]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(expected("ids"), use_cache=False).logits
    return found


def command(name: str, *argv: str) -> None:
    """One command in this process."""
    import importlib

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"usllm-{name}", *argv])
        importlib.import_module(f"usllm.cli.{name}").main()


# The packed folder


def test_old_folder_gives_the_old_logits_bit_for_bit() -> None:
    assert open_folder(WRITTEN / "packed").packed.format_version == 1
    inspect_folder(WRITTEN / "packed")
    assert torch.equal(logits(usllm.load(WRITTEN / "packed", dtype=torch.float32)), expected("packed"))
    direct = AutoModelForCausalLM.from_pretrained(WRITTEN / "packed", dtype=torch.float32)
    assert torch.equal(logits(direct), expected("packed"))


def test_old_folder_that_is_loaded_and_saved_becomes_a_new_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(WRITTEN / "packed", dtype=torch.float32)
    model.save_pretrained(tmp_path / "new")
    assert open_folder(tmp_path / "new").packed.format_version == 2
    inspect_folder(tmp_path / "new")
    assert torch.equal(logits(usllm.load(tmp_path / "new")), expected("packed"))
    assert torch.equal(logits(model), expected("packed"))


def test_damaged_layer_of_an_old_folder_is_named_as_before(written: Path) -> None:
    file = written / "packed" / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.1.mlp.up_proj"
    data[8 + length + json.loads(data[8 : 8 + length])[f"{name}.packed"]["data_offsets"][0] + 50] ^= 1
    file.write_bytes(data)
    with pytest.raises(PackedFormatError, match=rf"^{name}: its checksum is wrong"):
        usllm.load(written / "packed")


def test_old_folder_with_a_key_of_the_new_format_is_no_way_around_checksums(written: Path, tmp_path: Path) -> None:
    """A new folder that calls itself an old one lacks what old ones have."""
    AutoModelForCausalLM.from_pretrained(written / "packed").save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedFormatError, match=r"^quantization_config\.sketch: "):
        usllm.load(tmp_path / "new")


# The checkpoint, through the commands


def test_old_checkpoint_is_exported_with_the_old_logits(written: Path) -> None:
    command("export", f"ckpt={CHECKPOINT}", "out=exact", "rest.dtype=float32")
    assert torch.equal(logits(usllm.load("exact", dtype=torch.float32)), expected("checkpoint"))
    command("export", f"ckpt={CHECKPOINT}", "out=again", "rest.embeddings=8")
    assert torch.equal(logits(usllm.load("again", dtype=torch.float32)), expected("packed"))


def test_old_checkpoint_measures_as_it_did_wherever_its_cache_was(written: Path) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["usllm"]["config"]["data"]["cache_dir"] = "/dev/null/cache"  # a folder of its machine, none of this one
    torch.save(checkpoint, CHECKPOINT)
    command("eval", f"ckpt={CHECKPOINT}", "run_dir=evaluation")
    (row,) = json.loads((written / "evaluation" / "evaluation.json").read_text())["perplexity"]
    assert row["test_set"] == "validation"
    assert row["perplexity"] == pytest.approx(71.68358883842471, rel=1e-6)  # sums of another processor may differ


@pytest.mark.parametrize("given", [f"ckpt={CHECKPOINT}", "model=packed"])
def test_old_models_generate_the_old_text(given: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("generate", given, "prompt=the cat", "max_new_tokens=12")
    assert capsys.readouterr().out == (written / "generated.txt").read_text()


def test_old_folder_is_inspected_through_the_command(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", "model=packed")
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out


RUN = (
    *("experiment=tiny", "model=folder", "model.name=dense", "data.train.path=text.txt", "run_dir=run"),
    *("trainer.max_steps=6", "trainer.val_check_interval=3", "optimizer.lr=0.02", "sketch.bits_per_weight=1.5"),
    *("sketch.rows=2", "sketch.group_size=32", "sketch.state_bits=2", "sketch.output_scale=true"),
    *("~callbacks.progress", "callbacks.checkpoint.every_n_train_steps=3", "callbacks.checkpoint.keep=3"),
)
"""What the run was started with, in its README."""


def test_old_run_is_not_continued_to_other_bits(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command("train", *RUN, "resume=true")
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"usllm-train: error: resume=true: {CHECKPOINT} has format 1")
    assert "the last version of usllm that continues it is commit 1462762" in message.lower()
    assert "\n" not in message
    assert [path.name for path in (written / "run" / "checkpoints").iterdir()] == [Path(CHECKPOINT).name]
