"""Documents begin and end where they should, and no character is lost on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from usllm.data.sources.boundaries import group_rows, split_text

TITLE = "^ = [^=].* = $"
WIKI = " \n = One = \n \n text \n \n = = Part = = \n more \n = Two = \n end \n"


def test_separator_splits() -> None:
    assert split_text("a\n\nb\nc", "\n\n", None) == ["a", "b\nc"]


def test_titles_begin_articles_and_subtitles_do_not() -> None:
    before, one, two = split_text(WIKI, "\n\n", TITLE)
    assert before.strip() == ""
    assert one.startswith(" = One = ")
    assert "Part" in one
    assert two == " = Two = \n end \n"


def test_separator_and_titles_work_together() -> None:
    assert split_text("review\n\n = One = \nx\n = Two = \n", "\n\n", TITLE) == [
        "review",
        " = One = \nx\n",
        " = Two = \n",
    ]


@given(st.lists(st.sampled_from([" = A = \n", "", "text\n", " = = B = = \n"])))
def test_grouping_loses_nothing(rows: list[str]) -> None:
    groups = group_rows(rows, TITLE)
    assert "".join(groups) == "".join(rows)
    assert len(groups) <= 1 + rows.count(" = A = \n")
