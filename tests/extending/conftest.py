"""The example plug-in in the process of the tests, for as long as it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from usllm.compress.budgets import BUDGET_NEEDS, BUDGETS
from usllm.compress.registry import METHODS
from usllm.sketch.allocation import ALLOCATIONS, LARGEST, SMALLEST
from usllm.sketch.operators import OPERATORS
from usllm_kernels import dispatch

TABLES: list[dict[Any, Any]] = [
    METHODS,
    OPERATORS,
    ALLOCATIONS,
    SMALLEST,
    LARGEST,
    BUDGETS,
    BUDGET_NEEDS,
    dispatch._registered,
]


@pytest.fixture(scope="module")
def example_plugin() -> Iterator[ModuleType]:
    """Imported, and gone again: tests that draw from the tables know what is built in."""
    before = [dict(table) for table in TABLES]
    yield import_module("example_plugin")
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)
    for name in [name for name in sys.modules if name.partition(".")[0] == "example_plugin"]:
        del sys.modules[name]
