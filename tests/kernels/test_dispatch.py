"""Which backend computes, and what is said when it cannot."""

from __future__ import annotations

import pytest
import torch

from usllm_kernels import dispatch
from usllm_kernels.dispatch import VARIABLE, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "installed", lambda package: True)


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(CPU) == "numba"
    assert choose(CUDA) == "triton"
    assert choose(torch.device("mps")) == "torch"
    monkeypatch.setattr(dispatch, "installed", lambda package: False)
    assert choose(CPU) == choose(CUDA) == "torch"


def test_the_variable_decides_and_the_argument_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert choose(CPU) == choose(CUDA) == "torch"
    assert choose(CPU, "numba") == choose(CPU, "auto") == "numba"


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose(CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU, "triton") == "triton"


def test_impossible_choices_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='numba' computes on the CPU only"):
        choose(CUDA, "numba")
    monkeypatch.setenv(VARIABLE, "fortran")
    with pytest.raises(ValueError, match=r"USLLM_KERNELS=fortran is unknown.*auto, triton, numba, torch"):
        choose(CPU)
    monkeypatch.setattr(dispatch, "installed", lambda package: False)
    with pytest.raises(ValueError, match="pip install numba"):
        choose(CPU, "numba")
