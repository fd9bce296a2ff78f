"""The Python of README and docs runs as it stands, on a tiny model in place of a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import ROOT, blocks
from tiny_packed import pack, sketched_model

from usllm.compress import compressed_layers
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.stages import Calibrate
from usllm.training import SketchFinetuner


def counted(monkeypatch: pytest.MonkeyPatch, cls: type, method: str) -> list[None]:
    """A list that grows with every call of a method."""
    calls: list[None] = []
    ordinary = getattr(cls, method)

    def count(self: Any, *arguments: Any) -> Any:
        calls.append(None)
        return ordinary(self, *arguments)

    monkeypatch.setattr(cls, method, count)
    return calls


def run(source: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(source, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/packed.md"])
def test_packed_models_and_the_sketch(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(sketched_model(), tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    sources = blocks(ROOT / page, "python")
    assert sources
    for source in sources:
        if "from peft" not in source or importlib.util.find_spec("peft"):  # of the extra `adapters`
            run(source, page, {})


def test_plain_lightning(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains, packs and resumes without the commands; the first block is as short as the page says."""
    monkeypatch.chdir(tmp_path)
    random_model("llama").save_pretrained("my-llama")
    byte_tokenizer().save_pretrained("my-llama")
    Path("my.txt").write_text(tiny_text.read_text(encoding="utf-8"), encoding="utf-8")
    training, packing, resuming = blocks(ROOT / "docs" / "lightning.md", "python")
    statements = [line for line in training.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(training.splitlines()) <= 22
    assert len(statements) <= 12

    steps, calibrations = counted(monkeypatch, SketchFinetuner, "training_step"), counted(monkeypatch, Calibrate, "run")
    names: dict[str, Any] = {}
    run(training, "docs/lightning.md", names)
    module = names["module"]
    layers = compressed_layers(module.network)
    assert (len(steps), len(calibrations)) == (20, 1)
    assert len(layers) == 12
    assert all(layer.plan is not None for layer in layers.values())
    dense = random_model("llama").state_dict()
    trained = {key: value for key, value in module.network.state_dict().items() if key in dense}
    assert any(not torch.equal(value, dense[key]) for key, value in trained.items())

    run(packing, "docs/lightning.md", names)
    ids = torch.arange(24).view(1, -1)
    assert torch.allclose(names["packed"](ids).logits.float(), names["model"](ids).logits, atol=0.05)

    run(resuming, "docs/lightning.md", names)
    assert (len(steps), len(calibrations)) == (20, 1)  # all steps were done, and what was measured is in the checkpoint
    resumed = names["trainer"].lightning_module.network.state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in module.network.state_dict().items())
