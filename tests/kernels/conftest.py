"""What the contract tests of the kernels share: the backend under test, its device, and outputs that begin poisoned.

The same files run on a card (real mode) and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU; which of both
is decided when the kernels are first imported, so ``test_interpreted.py`` starts a process of its own for the latter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import unusable
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map

from usllm_kernels.dispatch import interpreted


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs Triton's kernels, so that ``-m cuda`` is what a card has to be asked for; skipped without one."""
    for item in items:
        of_backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        if of_backend == "triton" and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(params=["torch", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that can run here."""
    reason = unusable(request.param)
    if reason:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend is tested."""
    on_card = torch.cuda.is_available() and backend != "numba" and not interpreted()
    return torch.device("cuda" if on_card else "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is the test's alone."""
    monkeypatch.delenv("USLLM_KERNELS", raising=False)
    assert "USLLM_KERNELS" not in os.environ


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without being filled holds NaN, or an integer that no result has everywhere."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 85)

        return poison

    get_torch_obj_rule_map()  # dynamo looks torch's functions up by identity: it must have seen the real ones
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
