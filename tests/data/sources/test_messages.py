"""Columns of messages: what is a conversation, and the one line that says what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from usllm.data import SourceSpec
from usllm.data.sources import MESSAGES, read_documents, read_text
from usllm.data.sources.messages import messages_of
from usllm.system.errors import UserError

ASKED = {"role": "user", "content": "What is 2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4, of course.\r\nThat is all."}


def written(path: Path, *conversations: Any, **options: Any) -> SourceSpec:
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return SourceSpec(kind="jsonl", path=str(path), messages_field="messages", **options)


def test_conversations_are_the_same_from_json_lines_and_from_parquet(tmp_path: Path) -> None:
    conversations = [[ASKED, ANSWERED], [{"role": "system", "content": "Be kind."}, ASKED, ANSWERED]]
    spec = written(tmp_path / "a.jsonl", *conversations)
    named = [[{**message, "name": None} for message in each] for each in conversations]  # a struct has all keys
    pq.write_table(pa.table({"turns": named}), tmp_path / "a.parquet")
    table = SourceSpec(kind="parquet", path=str(tmp_path / "a.parquet"), messages_field="turns")
    found, again = read_documents(spec, "data.train"), read_documents(table, "data.train")
    assert found[MESSAGES][:] == again[MESSAGES][:]
    assert messages_of(found[MESSAGES][0]) == [ASKED, {**ANSWERED, "content": "4, of course.\nThat is all."}]
    assert found["text"][1] == "Be kind.\n\nWhat is 2 + 2?\n\n4, of course.\nThat is all."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, r"line 2 has no messages in 'messages'; set messages_field"),
        ("hello", r"line 2 holds no list of messages, each with role and content"),
        ([], r"line 2 holds no list of messages"),
        (["hello"], r"line 2, message 1 is no object with role and content"),
        ([{**ANSWERED, "content": " \n"}], r"line 2 holds nothing but white space"),
        ([ASKED], r"line 2 has no turn of the assistant"),
        (
            [{"role": "bot", "content": "x"}],
            r"line 2, message 1 has the role 'bot', which is unknown; known are",
        ),
        ([{"from": "gpt", "value": "x"}], r"line 2, message 1 has from and value: write them as role"),
        ([ASKED, {"role": "assistant", "content": None}], r"line 2, message 2 has no text in content"),
        ([ASKED, {"role": "assistant", "content": [{"type": "image"}]}], r"line 2, message 2 has no text in content"),
        ([ASKED, {**ANSWERED, "tool_calls": [1]}], r"line 2, message 2 has tool_calls, which is not read"),
        ([ASKED, {**ANSWERED, "content": "\ud800"}], r"line 2, message 2 holds half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(tmp_path: Path, messages: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"data\.train: .*a\.jsonl, {words}"):
        read_documents(written(tmp_path / "a.jsonl", [ASKED, ANSWERED], messages), "data.train")


def test_column_that_is_missing_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    spec = SourceSpec(kind="parquet", path=str(tmp_path / "a.parquet"), messages_field="messages")
    with pytest.raises(UserError, match=r"no column 'messages' but \['text'\]; set messages_field"):
        read_documents(spec, "data.train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "text"}, "jsonl, parquet and hub have columns"),
        ({"streaming": True}, "conversations are packed before the first step"),
        ({"document_start": "^a"}, "every conversation is a document"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    spec = SourceSpec(**({"kind": "jsonl", "path": "a.jsonl", "messages_field": "messages"} | options))
    assert any(words in problem for problem in spec.problems("data.train"))


def test_conversations_are_no_test_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="perplexity is measured on text as it is"):
        read_text(written(tmp_path / "a.jsonl", [ASKED, ANSWERED]), "evaluation.test_sets.a")
