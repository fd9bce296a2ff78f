"""Train, export, load in a new process, evaluate, generate and inspect: through the real commands on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from usllm.cli import eval as evaluation
from usllm.cli import export, generate, inspect, train
from usllm.packed.inspection import inspect_folder


def run(monkeypatch: pytest.MonkeyPatch, command: object, *argv: str) -> None:
    """One command in this process."""
    monkeypatch.setattr(sys, "argv", ["usllm", *argv])
    command.main()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run_dir(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={folder}", "trainer.max_steps=4"]
        run(patch, train, *argv, "~callbacks.progress")
    return folder


@pytest.fixture(scope="module")
def packed(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, packed without rounding what is not sketched."""
    out = tmp_path_factory.mktemp("out") / "packed"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, export, f"ckpt={run_dir}", f"out={out}", "rest.dtype=float32")
    return out


def test_packed_model_measures_as_the_run_reported(
    run_dir: Path, packed: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_set = ["evaluation=files", f"evaluation.test_sets.text.path={tiny_text}", "evaluation.windows=[32]"]
    test_set += ["evaluation.allow_shared=[text]"]
    common = [*test_set, "evaluation.precision=fp32", "evaluation.validation_split=false"]
    common.append("evaluation.allow_shared=[text]")  # the run was trained on it
    run(monkeypatch, evaluation, f"model={packed}", f"run_dir={tmp_path}/a", *common)
    run(monkeypatch, evaluation, f"ckpt={run_dir}", f"run_dir={tmp_path}/b", *common)
    ours, trained = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert [row["perplexity"] for row in ours["perplexity"]] == [row["perplexity"] for row in trained["perplexity"]]
    assert ours["compression"]["bits_per_weight"] == trained["compression"]["bits_per_weight"]


def test_fresh_process_gives_the_same_logits(run_dir: Path, packed: Path, tmp_path: Path) -> None:
    import torch

    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense
    from usllm.runs.saved_run import find_checkpoint, load_sketched_
    from usllm.training import load_checkpoint

    model = load_dense(ModelSpec(kind="random", name="llama"))
    load_sketched_(model, load_checkpoint(find_checkpoint(str(run_dir))))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
    script = (
        "import sys, torch, usllm\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "with torch.no_grad():\n    torch.save(model(torch.arange(30)[None]).logits, sys.argv[2])\n"
    )
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(packed), str(result)], check=True, timeout=120)
    assert torch.equal(torch.load(result, weights_only=True), wanted)


def test_inspect_balances_to_the_byte(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, inspect, f"model={packed}", f"json={tmp_path}/account.json")
    account = json.loads((tmp_path / "account.json").read_text())
    on_disk = sum(file.stat().st_size for file in packed.rglob("*") if file.is_file())
    assert account["accounted_bytes"] == account["disk_bytes"] == on_disk
    assert sum(layer["bytes"] for layer in account["layers"]) == account["sketched_bytes"]
    assert all(sum(layer["sections"].values()) == layer["bytes"] for layer in account["layers"])
    printed = capsys.readouterr().out
    assert re.search(rf"on disk\s+{on_disk:,} bytes", printed)
    assert re.search(rf"bits per sketched weight\s+{account['bits_per_weight']:.4f}\s+\(without the JSON", printed)
    assert re.search(rf"with these entries\s+{account['bits_per_weight_with_entries']:.4f}", printed)


def test_inspect_can_be_read_in_a_narrow_window(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, inspect, f"model={packed}")
    printed = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_proj" in printed
    assert "…" not in printed


def test_checkpoint_file_and_odd_folder_names_are_taken_as_they_are(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = max((run_dir / "checkpoints").glob("step=*.ckpt"))
    out = tmp_path / "my dir, a=b"
    run(monkeypatch, export, f"ckpt={checkpoint}", f"out={out}")
    run(monkeypatch, inspect, f"model={out}")


def test_tokenizer_of_a_stranger_runs_no_code(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / "trap"
    shutil.copytree(packed, trap)
    settings = json.loads((trap / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (trap / "tokenizer_config.json").write_text(json.dumps(settings))
    (trap / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SystemExit):
        run(monkeypatch, generate, f"model={trap}", "prompt=x", "max_new_tokens=1")
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_generate_goes_on_from_the_prompt(
    packed: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "prompt=it's a cat, {sat} on: a=mat"  # signs that mean something to Hydra
    run(monkeypatch, generate, f"model={packed}", prompt, "max_new_tokens=5")
    from_packed = capsys.readouterr().out
    run(monkeypatch, generate, f"model={packed}", prompt, "max_new_tokens=5", "layout=decoded", "layout_memory=1MB")
    assert capsys.readouterr().out == from_packed
    run(monkeypatch, generate, f"model={packed}", prompt, "max_new_tokens=5", "layout=expanded")
    assert capsys.readouterr().out == from_packed
    run(monkeypatch, generate, f"ckpt={run_dir}", prompt, "max_new_tokens=5")
    assert capsys.readouterr().out == from_packed
    assert from_packed.strip("\n")


def test_card_holds_figures_commands_and_the_line_to_import(run_dir: Path, packed: Path) -> None:
    card = (packed / "README.md").read_text()
    report = json.loads((run_dir / "report.json").read_text())
    assert "import usllm" in card
    assert report["command"] in card
    assert f"usllm-export ckpt={run_dir} out={packed} rest.dtype=float32" in card
    assert f"{report['perplexity'][0]['finetuned']:.2f}" in card
    assert f"all that its tensors hold | {report['bits_per_weight']['achieved']:.4f} |" in card
    with_entries = inspect_folder(packed).bits_per_weight_with_entries
    assert f"with the JSON entries of these tensors | {with_entries:.4f} |" in card
    assert f"{(packed / 'model.safetensors').stat().st_size:,}" in card


def test_dense_model_is_packed_without_training_and_measured(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "model=random", "data=text", f"data.train.path={tiny_text}", "data.context_length=32", "data.num_proc=1",
        "allocation=waterfill", "sketch.bits_per_weight=2", "sketch.group_size=64", "calibration_sequences=4",
        "measure=true", "evaluation.windows=[32]", "evaluation.max_windows=2", "data.validation_fraction=0.1",
        "rest.embeddings=8", "rest.linears=4", f"out={tmp_path}/packed",
    ]  # fmt: skip
    run(monkeypatch, export, *argv)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "this folder" in card
    run(monkeypatch, inspect, f"model={tmp_path}/packed")


@pytest.mark.parametrize(
    ("command", "argv", "named"),
    [
        (export, ["ckpt={run}", "out={packed}"], "overwrite=true"),
        (export, ["ckpt={run}", "out=x", "rest.embeddings=5"], "rest.embeddings=5"),
        (export, ["ckpt={run}", "out=x", "max_shard_size=much"], "max_shard_size=much"),
        (export, ["ckpt=/no/such", "out=x"], "no such file or folder"),
        (inspect, ["model=/no/such"], "no such folder"),
        (inspect, ["model={run}"], "config.json: is missing"),
        (generate, ["prompt=x"], "give exactly one"),
        (generate, ["model={packed}", "prompt="], "prompt: is empty"),
        (generate, ["ckpt={run}", "prompt=x", "layout=decoded"], "layout=decoded: has a meaning for packed models"),
        (export, ["ckpt={run}", "out=x", "sketch.rows=1"], "sketch.rows=1: ckpt="),
        (export, ["ckpt={run}", "out=x", "max_shard_size=0"], "max_shard_size=0"),
        (export, ["ckpt={run}", "out={run}", "overwrite=true"], "not a packed model"),
        (generate, ["model={packed}", "prompt=x", "chat=true"], "chat template"),
        (generate, ["model={packed}", "prompt=x", "max_new_tokens=9999"], "max_new_tokens=9999"),
        (train, ["experiment=tiny", "data.train.path={text}", "model={packed}", "run_dir={tmp}"], "is a packed model"),
    ],
)
def test_bad_input_ends_in_one_message(
    command: object,
    argv: list[str],
    named: str,
    run_dir: Path,
    packed: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(run=run_dir, packed=packed, text=tiny_text, tmp=tmp_path) for argument in argv]
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command, *filled)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
