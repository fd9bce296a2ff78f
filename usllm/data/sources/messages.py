"""Conversations in a column of messages, and the one form in which they are documents like any other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from usllm.data.sources.plain import plain_text
from usllm.system.errors import UserError

MESSAGES = "messages"
"""Column of conversations, beside ``text``, in tables of documents."""
NO_TEST_SET = "perplexity is measured on text as it is; conversations are measured in training, as val/ppl"
ASSISTANT = "assistant"
ALL = "all"
LOSS_ON = (ASSISTANT, ALL)
"""Whose turns are learnt."""
ROLES = ("system", "user", ASSISTANT, "tool")
"""Roles that are read; a template that leaves one of them out is refused when it writes the conversation."""
Messages = list[dict[str, str]]
"""Turns of a conversation, each with ``role`` and ``content``."""


def conversation(messages: Any, where: str) -> str:
    """A conversation as a document: its messages as JSON, the same whatever file they came from.

    Args:
        messages: a list of objects with ``role`` and ``content``, as OpenAI's interface and most data sets write them.
        where: file and line or row, for messages.

    Raises:
        UserError: they are something else, have an unknown role or a key that is not read, or no turn is the
            assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} holds no list of messages, each with role and content")
    found = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]
    if all(message["role"] != ASSISTANT for message in found):
        raise UserError(f"{where} has no turn of the assistant: there is nothing to learn from it; take it out")
    if not any(message["content"].strip() for message in found):
        raise UserError(f"{where} holds nothing but white space; take it out")
    return json.dumps(found, ensure_ascii=False)


def messages_of(document: str) -> Messages:
    """The messages of a document that :func:`conversation` made."""
    messages: Messages = json.loads(document)
    return messages


def spoken(documents: Iterable[str]) -> Iterator[str]:
    """What was said in each conversation, without roles and marks: what is compared with other texts."""
    return ("\n\n".join(message["content"] for message in messages_of(document)) for document in documents)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where} is no object with role and content")
    given = {key: value for key, value in message.items() if value is not None}  # a column of Parquet has all keys
    if {"from", "value"} <= given.keys():
        raise UserError(f"{where} has from and value: write them as role ({', '.join(ROLES)}) and content")
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}, which is unknown; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{where} has no text in content; lists of parts, calls of tools and images are not read")
    if more := sorted(given.keys() - {"role", "content"}):
        raise UserError(f"{where} has {', '.join(more)}, which is not read; take it out")
    return {"role": role, "content": plain_text(content, where)}
