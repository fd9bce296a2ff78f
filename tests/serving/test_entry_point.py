"""vLLM's entry point where there is no vLLM: it is declared, leads to a function, and nobody pays for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # 3.10 has it as a package, which mypy brings
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points: dict[str, str] = project["entry-points"]["vllm.general_plugins"]
    return points


def test_the_entry_point_leads_to_a_function() -> None:
    (name,) = declared()
    assert callable(EntryPoint(name, declared()[name], "vllm.general_plugins").load())


def test_the_entry_point_is_found_without_importing_anything_heavy() -> None:
    module = declared()["usllm"].partition(":")[0]
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'vllm', 'numba'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_only_the_call_asks_for_vllm() -> None:
    from usllm.serving.vllm.plugin import register

    with pytest.raises(ModuleNotFoundError, match="vllm"):
        register()
