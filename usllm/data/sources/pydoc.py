"""Python's own documentation: plain technical English that every installation holds.

The language reference's topics (``pydoc_data.topics``, what ``help()`` shows) and the docstrings of the standard
library. Sources are parsed, never imported: importing ``this``, ``antigravity`` or ``turtledemo`` does things.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from pathlib import Path

from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import UserError

# Not documentation of the library: installed packages, tests and their data.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(spec: SourceSpec) -> list[str]:
    """One document per topic and one per module, each in the order of their names."""
    del spec  # nothing to choose
    found = _topics() + _docstrings(Path(sysconfig.get_path("stdlib")))
    if not found:
        raise UserError("this Python was installed without its documentation and sources; use data=text instead")
    return found


def whole_text(spec: SourceSpec) -> str:
    """All documents, joined by ``spec.separator``."""
    return spec.separator.join(documents(spec))


def _topics() -> list[str]:
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _docstrings(library: Path) -> list[str]:
    """Docstrings of each module, its classes and functions, in their order in the file."""
    found = []
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the sources of others
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 and others ship sources that are wrong on purpose
            continue
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        docstrings = [text for text in map(ast.get_docstring, nodes) if text]
        if docstrings:
            found.append("\n\n".join(docstrings))
    return found
