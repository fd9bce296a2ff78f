"""What a report says about the machine, and the precision that it allows."""

from __future__ import annotations

import pytest
import torch

from usllm.system import machine as module
from usllm.system.machine import choose_precision, machine, machine_line


def test_line_names_processor_cores_and_torch() -> None:
    line = machine_line(machine())
    assert f"torch {torch.__version__}" in line
    assert "cores" in line


@pytest.mark.parametrize(
    ("features", "precision"),
    [({}, "32-true"), ({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed")],
)
def test_auto_precision_follows_the_hardware(
    features: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert choose_precision("auto", "cpu") == precision


def test_a_chosen_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_bf16", lambda accelerator: True)
    assert choose_precision("32-true", "cpu") == "32-true"
