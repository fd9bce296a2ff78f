"""What a dense model and a text decide is computed once, and a kept result is a fresh one bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed

from usllm.config import check_train, plain_config
from usllm.models import ModelSpec
from usllm.models.identity import weights_digest
from usllm.models.loading import load_dense
from usllm.runs import measure
from usllm.runs.finetune import finetune
from usllm.stages import calibrate
from usllm.system.results import arithmetic, kept_tensors, tokens_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed, and not taken from the cache."""
    calls: list[str] = []

    def spy(module: Any, name: str, label: Callable[..., str]) -> None:
        ordinary = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(label(*args))
            return ordinary(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    spy(calibrate, "measure_statistics", lambda *_: "importance")
    spy(measure, "measure", lambda *args: str(args[4]))
    return calls


def run(text: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """One run of a single step."""
    few = ["trainer.max_steps=1", "~callbacks.progress", "logger=none", f"run_dir={run_dir}"]
    cfg = composed("experiment=tiny", f"data.train.path={text}", *few, *overrides)
    return finetune(check_train(cfg), plain_config(cfg), "usllm-train")


def importance_of(run_dir: Path) -> dict[str, Any]:
    checkpoint = torch.load(max((run_dir / "checkpoints").glob("*.ckpt")), weights_only=True)
    return {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.endswith("importance")}


def test_second_run_of_a_sweep_computes_neither_and_gets_the_same_bits(
    tiny_text: Path, tmp_path: Path, computed: list[str]
) -> None:
    first = run(tiny_text, tmp_path / "a", "sketch.rows=1")
    assert computed == ["Dense model", "importance", "Sketched model"]
    computed.clear()
    second = run(tiny_text, tmp_path / "b", "sketch.rows=2")
    assert computed == ["Sketched model"]
    computed.clear()
    third = run(tiny_text, tmp_path / "c", "sketch.rows=2", "reuse_statistics=false")
    assert computed == ["Dense model", "importance", "Sketched model"]

    kept, fresh = importance_of(tmp_path / "b"), importance_of(tmp_path / "c")
    assert kept.keys() == fresh.keys() != set()
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)
    dense = {report["perplexity"][0]["dense"] for report in (first, second, third)}
    assert len(dense) == 1
    assert second["perplexity"] == third["perplexity"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.calibrate.sequences=3", ["importance", "Sketched model"]),
        ("evaluation.max_windows=2", ["Dense model", "Sketched model"]),
        ("model.name=qwen3", ["Dense model", "importance", "Sketched model"]),
    ],
)
def test_what_a_result_depends_on_is_part_of_its_key(
    override: str, expected: list[str], tiny_text: Path, tmp_path: Path, computed: list[str]
) -> None:
    run(tiny_text, tmp_path / "a")
    computed.clear()
    run(tiny_text, tmp_path / "b", override)
    assert computed == expected


def test_model_is_known_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    spec = ModelSpec(kind="random", name="llama")
    model = load_dense(spec)
    model.save_pretrained(tmp_path / "copy")
    copy = load_dense(dataclasses.replace(spec, kind="folder", name=str(tmp_path / "copy")))
    assert weights_digest(copy) == weights_digest(model)
    with torch.no_grad():
        next(copy.parameters()).view(-1)[0].add_(1e-3)
    assert weights_digest(copy) != weights_digest(model)


def test_digest_sees_order_shape_and_every_token() -> None:
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2, 3, 4]])
    digests = [tokens_digest(batches) for batches in ([a], [b], [a, b], [b, a], [a + 1])]
    assert len(set(digests)) == 5
    assert tokens_digest([a.int()]) == tokens_digest([a])


def test_arithmetic_tells_threads_and_precision_apart() -> None:
    device, threads = torch.device("cpu"), torch.get_num_threads()
    here = arithmetic(device, None)
    assert json.loads(json.dumps(here)) == here
    assert arithmetic(device, torch.bfloat16) != here
    try:
        torch.set_num_threads(threads + 1)
        assert arithmetic(device, None) != here
    finally:
        torch.set_num_threads(threads)


def test_kept_tensors_are_those_that_were_computed(cache: Path) -> None:
    tensors = {"a.b": torch.randn(5), "c": torch.randn(2, 3).T}

    def never() -> dict[str, torch.Tensor]:
        raise AssertionError("computed again")

    kept_tensors("kind", {"x": 1}, lambda: tensors)
    found = kept_tensors("kind", {"x": 1}, never)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found.keys() == tensors.keys()
    with pytest.raises(AssertionError, match="computed again"):
        kept_tensors("kind", {"x": 2}, never)
