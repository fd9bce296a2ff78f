"""Folders of SmolLM2-135M, each made once for all tests of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from engines import packed_smollm2


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method."""

    @lru_cache
    def made(method: str) -> Path:
        return packed_smollm2(method, tmp_path_factory.mktemp(method) / "packed")

    return made
