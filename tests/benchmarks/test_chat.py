"""Conversations made of docstrings, and the page that says what tuning on them gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chat
from usllm.data.sources.messages import conversation

MODULE = '''
def dedent(text):
    """Remove common white space

    from the beginning of lines."""
class Wrapper:
    """A class."""
    async def later(self):
        """A coroutine is left out, too."""
    def fill(self):
        """Fill a paragraph
        with lines."""
    def _own(self):
        """Nobody asks for this one either."""
    def short(self):
        """Too short."""
'''


def test_docstrings_become_conversations(tmp_path: Path) -> None:
    for place in ("textwrap.py", "json/__init__.py", "tests/text.py"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(MODULE)
    found = [row["messages"] for row in chat.conversations(tmp_path)]
    assert all(conversation(messages, "here") for messages in found)
    assert [(asked["content"], answered["content"]) for asked, answered in found] == [
        (f"What does {module}.{name} do?", answer)
        for module in ("json", "textwrap")
        for name, answer in (
            ("dedent", "Remove common white space"),
            ("Wrapper.fill", "Fill a paragraph with lines."),
        )
    ]


@pytest.mark.skipif(not chat.KEPT.is_file(), reason="not measured yet")
def test_page_is_what_the_file_gives() -> None:
    facts = json.loads(chat.KEPT.read_text(encoding="utf-8"))
    assert f"{chat.BEGIN}\n\n{chat.table(facts)}\n\n{chat.END}" in chat.PAGE.read_text(encoding="utf-8")
