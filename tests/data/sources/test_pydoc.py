"""Python's own documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from usllm.data import SourceSpec
from usllm.data.sources import pydoc
from usllm.system.errors import UserError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of three modules, one of which must not be imported."""
    (tmp_path / "b.py").write_text('"""Module b."""\nclass C:\n    """Class C."""\n    def f(self): "Method f."\n')
    (tmp_path / "a.py").write_text('raise SystemExit\ndef g():\n    """Function g."""\n')
    (tmp_path / "bad.py").write_text("def (:\n")
    for skipped in ("site-packages", "test"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "x.py").write_text('"""Not ours."""')
    monkeypatch.setattr(pydoc.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("library")
def test_docstrings_by_module_name_and_line() -> None:
    documents = pydoc.documents(SourceSpec())
    assert documents[-2:] == ["Function g.", "Module b.\n\nClass C.\n\nMethod f."]


@pytest.mark.usefixtures("library")
def test_topics_come_first() -> None:
    from pydoc_data.topics import topics

    assert pydoc.documents(SourceSpec())[: len(topics)] == [topics[name] for name in sorted(topics)]


def test_nothing_of_the_library_is_imported(library: Path) -> None:
    before = set(sys.modules)
    pydoc.documents(SourceSpec())
    assert {name for name in set(sys.modules) - before if not name.startswith("pydoc_data")} == set()


def test_python_without_documentation_says_what_to_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydoc.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(pydoc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="data=text"):
        pydoc.documents(SourceSpec())
