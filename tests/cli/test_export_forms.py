"""Decoded forms of a run and of a packed folder, through the real command and back through this package's readers."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from gguf_of_model import write_model
from safetensors import safe_open

from usllm.cli import eval as evaluation
from usllm.cli import export, train
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_packed, load_tokenizer
from usllm.runs import export_decoded

SKETCH = ["allocation=uniform", "sketch.bits_per_weight=4", "sketch.rows=1", "sketch.group_size=16"]


def run(command: object, *argv: str) -> None:
    """One command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["usllm", *argv])
        command.main()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run_dir(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, of a model whose tokenizer llama.cpp has too."""
    root = tmp_path_factory.mktemp("run")
    write_model(root / "model.gguf", "llama")
    common = ["experiment=tiny", f"model={root}/model.gguf", f"data.train.path={tiny_text}", "trainer.max_steps=2"]
    run(train, *common, *SKETCH, "data.context_length=32", f"run_dir={root}/run", "~callbacks.progress")
    return root / "run"


@pytest.fixture(scope="module")
def packed(run_dir: Path) -> Path:
    """The run, packed with everything else in fp32."""
    out = run_dir.parent / "packed"
    run(export, f"ckpt={run_dir}", f"out={out}", "rest.dtype=float32")
    return out


def logits(spec: ModelSpec) -> torch.Tensor:
    model = load_packed(spec) or load_dense(spec)
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30), use_cache=False).logits


def folder(path: Path) -> ModelSpec:
    return ModelSpec(kind="folder", name=str(path))


@pytest.mark.parametrize("source", ["ckpt", "packed"])
def test_dense_form_in_fp32_has_the_logits_of_the_packed_one(
    source: str, run_dir: Path, packed: Path, tmp_path: Path
) -> None:
    given = f"ckpt={run_dir}" if source == "ckpt" else f"model={packed}"
    run(export, given, f"out={tmp_path}/dense", "form=dense", "dense.dtype=float32", "max_shard_size=30kB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    assert torch.equal(logits(folder(tmp_path / "dense")), logits(folder(packed)))
    assert (
        load_tokenizer(folder(tmp_path / "dense"))("ab a").input_ids == load_tokenizer(folder(packed))("ab a").input_ids
    )


@pytest.mark.parametrize("source", ["ckpt", "packed"])
def test_gguf_form_in_fp32_has_the_logits_of_the_packed_one(
    source: str, run_dir: Path, packed: Path, tmp_path: Path
) -> None:
    given = f"ckpt={run_dir}" if source == "ckpt" else f"model={packed}"
    run(export, given, f"out={tmp_path}/model.gguf", "form=gguf", "gguf.type=F32")
    spec = ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf"))
    assert torch.equal(logits(spec), logits(folder(packed)))
    assert load_tokenizer(spec)("ab a").input_ids == load_tokenizer(folder(packed))("ab a").input_ids


def test_bits_that_are_gone_are_said(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf import GGUFReader

    out = tmp_path / "my model"
    argv = [f"model={packed}", f"out={out}", "form=dense"]
    run(export, *argv)
    printed = " ".join(capsys.readouterr().out.split())
    before = (packed / "model.safetensors").stat().st_size
    after = (out / "model.safetensors").stat().st_size
    told = f"bits per weight are gone: the weights take {after:,} bytes as bfloat16"
    card = (out / "README.md").read_text()
    assert told in printed
    assert f"the {before:,} of the packed form" in printed
    assert told in " ".join(card.split())
    assert "usllm" not in card.partition("```python")[2].partition("```")[0]  # nothing of ours is needed to load it
    assert shlex.join(argv) in card
    run(export, f"model={packed}", f"out={tmp_path}/model.gguf", "form=gguf", "gguf.type=Q8_0")
    description = GGUFReader(tmp_path / "model.gguf").fields["general.description"].contents()
    assert "bits per weight are gone" in description
    assert f"the {before:,} of the packed form" in description
    told_too = capsys.readouterr()
    assert "Q8_0 (16 tensors)" in " ".join(told_too.out.split())
    assert "tensors, total_size" not in told_too.out + told_too.err  # what the package gguf tells of its work


def test_run_is_measured_in_its_dense_form(run_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    run(export, f"ckpt={run_dir}", f"out={out}", "form=dense", "dense.dtype=float32", "measure=true")
    report = json.loads((run_dir / "report.json").read_text())
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| validation"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-1] == f"{report['perplexity'][0]['finetuned']:.2f}"
    common = ["evaluation.windows=[32]", "evaluation.max_windows=2", f"data=[{tiny_text}]"]
    run(evaluation, f"model={out}", *common, f"run_dir={tmp_path}/eval")


def test_packed_model_is_measured_on_what_is_given_alone(
    packed: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dense"
    given = ["evaluation=files", f"evaluation.test_sets.text.path={tiny_text}", "evaluation.windows=[32]"]
    given += ["evaluation.max_windows=2", "evaluation.precision=fp32"]
    run(export, f"model={packed}", f"out={out}", "form=dense", "dense.dtype=float32", "measure=true", *given)
    rows = [line for line in (out / "README.md").read_text().splitlines() if line.startswith(("| text", "| valid"))]
    run(evaluation, f"model={packed}", *given, "evaluation.validation_split=false", f"run_dir={tmp_path}/eval")
    (wanted,) = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["perplexity"]
    assert len(rows) == 1  # none of a default text that the model has never seen
    assert [cell.strip() for cell in rows[0].strip("|").split("|")][-1] == f"{wanted['perplexity']:.2f}"


@pytest.mark.parametrize("given", [["sketch.rows=1"], ["calibration_sequences=2"], ["measure=true"]])
def test_packed_model_of_the_hub_refuses_what_one_of_a_folder_does(
    given: list[str], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(export_decoded, "packed_folder", lambda spec: packed)  # fetched
    for model in (str(packed), "someone/model"):
        with pytest.raises(SystemExit):
            run(export, f"model={model}", f"out={tmp_path}/dense", "form=dense", *given)
        told.append(capsys.readouterr().err.splitlines()[-1].replace(model, "MODEL"))
    assert given[0].partition("=")[0] in told[0]
    assert told[0] == told[1]


@pytest.mark.parametrize("source", ["dense", "packed"])
def test_file_is_planned_once(
    source: str, packed: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, plan_gguf = [], export_decoded.plan_gguf
    monkeypatch.setattr(
        export_decoded, "plan_gguf", lambda *files, **types: plans.append(types) or plan_gguf(*files, **types)
    )
    given = [f"model={packed}"]
    if source == "dense":
        given = [
            f"model={packed.parent}/model.gguf",
            "data=text",
            f"data.train.path={tiny_text}",
            "data.context_length=32",
            *SKETCH,
        ]
        given.append("calibration_sequences=1")
    run(export, *given, f"out={tmp_path}/model.gguf", "form=gguf", "gguf.type=F16", "gguf.embeddings=Q8_0")
    assert plans == [{"kind": "F16", "embeddings": "Q8_0"}]
    assert load_dense(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))


def test_existing_places_are_kept_unless_told_otherwise(packed: Path, tmp_path: Path) -> None:
    dense = [f"model={packed}", f"out={tmp_path}/dense", "form=dense"]
    gguf = [f"model={packed}", f"out={tmp_path}/model.gguf", "form=gguf"]
    for argv in (dense, gguf):
        run(export, *argv)
        with pytest.raises(SystemExit):
            run(export, *argv)
        run(export, *argv, "overwrite=true")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "model.gguf"]


def test_weights_of_a_packed_model_in_bf16_are_rounded_where_they_were_decoded_only(
    run_dir: Path, tmp_path: Path
) -> None:
    run(export, f"ckpt={run_dir}", f"out={tmp_path}/packed")
    run(export, f"model={tmp_path}/packed", f"out={tmp_path}/dense", "form=dense")
    with (
        safe_open(tmp_path / "packed" / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "dense" / "model.safetensors", "pt") as after,
    ):
        kept = [name for name in before.keys() if not name.endswith(".packed")]  # noqa: SIM118 (not a mapping)
        assert "model.embed_tokens.weight" in kept
        for name in kept:
            assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name
