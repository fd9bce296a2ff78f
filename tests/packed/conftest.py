"""A packed folder in one file and in shards, and copies of it for one test each."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_folders import copied
from tiny_packed import pack, sketched_model

from usllm.packed.export import RestStorage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with blocks of 8 bits for embeddings and 4 for the rest, in one file and in shards."""
    root = tmp_path_factory.mktemp("folders")
    model = sketched_model()
    pack(model, root / "one", RestStorage("bfloat16", 8, 4))
    pack(model, root / "shards", RestStorage("bfloat16", 8, 4), max_shard_size=20_000)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copied(made / "one", tmp_path / "packed")


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return copied(made / "shards", tmp_path / "packed")
