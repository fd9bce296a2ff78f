"""Every kind of model file through the real command: the right figure, or one line; never a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from damaged_folders import DAMAGED, WHOLE, write_folder
from damaged_gguf import METADATA, TENSORS
from gguf_of_model import MODELS, write_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from usllm.cli import eval as command
from usllm.eval.perplexity import perplexity

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5
Case = Callable[[Path], PreTrainedModel | None]
"""Writes ``model.gguf`` or the folder ``model``, and returns the model that it is meant to be, or None."""


def whole_folder(name: str) -> Case:
    def write(place: Path) -> PreTrainedModel:
        arguments, change = WHOLE[name]
        write_folder(place / "model", **arguments)
        change(place / "model")
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        return loaded

    return write


def damaged_folder(name: str) -> Case:
    def write(place: Path) -> None:
        arguments, change, _ = DAMAGED[name]
        write_folder(place / "model", **arguments)
        change(place / "model")

    return write


def whole_gguf(name: str) -> Case:
    return lambda place: write_model(place / "model.gguf", name)


def gguf_of_other_metadata(index: int) -> Case:
    def write(place: Path) -> None:
        name, metadata, _ = METADATA[index]
        write_model(place / "model.gguf", name, metadata=metadata)

    return write


def gguf_of_other_tensors(index: int) -> Case:
    def write(place: Path) -> None:
        write_model(place / "model.gguf", "llama", tensors=TENSORS[index][0])

    return write


def cut_gguf(share: float) -> Case:
    def write(place: Path) -> None:
        path = place / "model.gguf"
        write_model(path, "llama")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


def cases() -> Iterator[tuple[str, Case]]:
    yield from ((f"folder: {name}", whole_folder(name)) for name in WHOLE)
    yield from ((f"damaged folder: {name}", damaged_folder(name)) for name in DAMAGED)
    yield from ((f"gguf: {name}", whole_gguf(name)) for name in MODELS)
    yield from ((f"gguf: {METADATA[index][2]}", gguf_of_other_metadata(index)) for index in range(len(METADATA)))
    yield from ((f"gguf: {TENSORS[index][1]}", gguf_of_other_tensors(index)) for index in range(len(TENSORS)))
    yield from ((f"gguf cut at {share}", cut_gguf(share)) for share in (0.0, 0.001, 0.05, 0.3, 0.7, 0.999))


CASES = dict(cases())


def test_there_are_at_least_fifty() -> None:
    assert len(CASES) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_file_gives_the_right_figure_or_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    meant = CASES[name](tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    place = next(path for path in (tmp_path / "model", tmp_path / "model.gguf") if path.exists())
    tests = ["evaluation=files", f"evaluation.test_sets.text.path={tmp_path}/text.txt", "evaluation.windows=[32]"]
    monkeypatch.setattr(sys, "argv", ["usllm-eval", f"model={place}", f"run_dir={tmp_path}/out", *tests])
    status = 0
    try:
        command.main()  # any other exception would be a traceback
    except SystemExit as ended:
        status = int(ended.code or 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("usllm-eval: ")]
    if meant is None or (BEFORE_5 and name.startswith(("gguf: gemma", "gguf: phi3"))):
        assert status in (1, 2)
        assert len(errors) == 1
        assert errors[0].startswith("usllm-eval: error: ")
        return
    assert status == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())["perplexity"][0]
    from usllm.models import ModelSpec
    from usllm.models.loading import load_tokenizer

    kind = {"kind": "folder", "name": str(place)} if place.is_dir() else {"kind": "gguf", "file": str(place)}
    tokenizer = load_tokenizer(ModelSpec(**{"name": None, **kind}))
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    each = "gemma" in name
    assert result["window_start"] == ("each" if each else "none")
    first = tokenizer.bos_token_id if each else None
    # The command computes in bf16 where the processor has it.
    assert result["perplexity"] == pytest.approx(perplexity(meant, ids, 32, first=first).perplexity, rel=1e-2)
