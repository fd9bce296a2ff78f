"""vLLM's entry point where there is no vLLM: it is declared, leads to a function, and nobody pays for it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def declared() -> EntryPoint:
    """The entry point as ``pyproject.toml`` has it: what is installed may be older."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.entry-points\."vllm\.general_plugins"\]\n(\w+) = "([\w.:]+)"$', text, re.MULTILINE)
    assert found is not None
    return EntryPoint(found[1], found[2], "vllm.general_plugins")


def test_the_entry_point_leads_to_a_function() -> None:
    assert declared().name == "usllm"
    assert callable(declared().load())


def test_the_entry_point_is_found_without_importing_anything_heavy() -> None:
    module = declared().module
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'vllm', 'numba'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_only_the_call_asks_for_vllm() -> None:
    from usllm.serving.vllm.plugin import register

    with pytest.raises(ModuleNotFoundError, match="vllm"):
        register()
