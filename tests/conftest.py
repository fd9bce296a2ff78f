"""What all tests share: no cache of the user is touched, one thread a process, and a text that is always the same."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import PRELOADED

# Before torch is imported: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; a forgotten request fails at once

# A process has one server of forks: said here, so that no test starts it with less.
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

TEXT = "the cat sat on a mat while seven dogs ran over green hills and sang of rivers that bend toward home"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the cache to a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 documents of 60 words, with blank lines between them."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path
