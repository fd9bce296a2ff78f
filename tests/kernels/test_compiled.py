"""Machine code of the CPU kernels is kept by the digest of all their sources."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from numba.core.caching import IndexDataCacheFile  # noqa: E402

from usllm_kernels.cpu import compiled, stream  # noqa: E402  # needs numba


def test_code_of_other_sources_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text("from inner import f")
    (tmp_path / "inner.py").write_text("one")
    before = compiled.code_folder(tmp_path)
    compiled.code_folder.cache_clear()
    assert compiled.code_folder(tmp_path) == before
    (tmp_path / "inner.py").write_text("two")
    compiled.code_folder.cache_clear()
    after = compiled.code_folder(tmp_path)
    assert before is not None and after is not None
    assert after.name != before.name and after.parent == before.parent


def test_constants_from_other_folders_are_among_the_sources() -> None:
    """Every module outside of the folder that a compiled file takes a number from decides which code is used."""
    here = Path(compiled.__file__).parent
    taken = set()
    for file in here.glob("*.py"):
        module = import_module(f"usllm_kernels.cpu.{file.stem}")
        if not any(hasattr(value, "py_func") for value in vars(module).values()) and "intrinsic" not in vars(module):
            continue  # nothing in it is compiled
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("usllm_kernels.cpu"):
                names = [alias.name for alias in node.names if isinstance(vars(module).get(alias.name), int | float)]
                taken |= {node.module} if names else set()
    assert taken >= {"usllm.sketch.scale", "usllm_kernels.planes", "usllm_kernels.blocks"}
    assert taken <= {module.__name__ for module in compiled.ELSEWHERE}


def test_code_is_kept_in_the_folder_of_these_sources() -> None:
    codes = np.empty(8, np.int8)
    stream.unpack_run(np.full(16, 0xFF, np.uint8), 0, 1, 8, codes, 0)
    assert (codes == -1).all()
    folder = compiled.code_folder(Path(compiled.__file__).parent, numba.config.CACHE_DIR)
    assert folder is not None and Path(stream.unpack_run.stats.cache_path).is_relative_to(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files")
def test_one_process_at_a_time_reads_and_writes_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would take the same number for another signature: the index of one, the code of the other."""
    import fcntl

    monkeypatch.setattr(compiled, "code_folder", lambda sources, asked: tmp_path)
    seen = []

    def watched(name: str) -> None:
        before = getattr(IndexDataCacheFile, name)

        def watching(self: Any, *arguments: Any) -> Any:
            with (tmp_path / ".twice.lock").open("ab") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(name)
            return before(self, *arguments)

        monkeypatch.setattr(IndexDataCacheFile, name, watching)

    def twice(number: int) -> int:
        return 2 * number

    for name in ("load", "_load_index", "_save_index", "_save_data"):
        watched(name)
    assert compiled.compiled(twice)(4) == 8
    assert seen == ["load", "_load_index", "_load_index", "_save_index", "_save_data"]


def test_other_functions_of_the_user_are_kept_where_they_were() -> None:
    before = numba.config.CACHE_DIR
    compiled.compiled(lambda: 0)
    after = numba.config.CACHE_DIR
    assert after == before


def test_a_package_that_cannot_be_written_to_uses_the_cache_or_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__pycache__").write_text("no folder can be made here")
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    compiled.code_folder.cache_clear()
    found = compiled.code_folder(tmp_path)
    assert found is not None and found.is_relative_to(tmp_path / "cache")
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "__pycache__" / "cache"))
    compiled.code_folder.cache_clear()
    assert compiled.code_folder(tmp_path) is None
    monkeypatch.setattr(compiled, "code_folder", lambda sources, asked: None)
    assert compiled.compiled(lambda: 7)() == 7


def test_the_users_own_folder_is_taken(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    compiled.code_folder.cache_clear()
    found = compiled.code_folder(tmp_path, str(asked))
    assert found is not None and found.is_relative_to(asked)
