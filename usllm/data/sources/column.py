"""A row of a column, of text or of messages, as a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from usllm.data.sources.messages import conversation
from usllm.data.sources.plain import plain_text
from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import UserError


def document(value: Any, spec: SourceSpec, where: str) -> str:
    """What a row holds in the column that ``spec`` names.

    Args:
        value: of the row.
        spec: the source.
        where: file and line or row, for messages.

    Raises:
        UserError: it is no text, or no conversation.
    """
    if spec.messages_field is not None:
        if value is None:
            raise UserError(f"{where} has no messages in {spec.field!r}; set messages_field")
        return conversation(value, where)
    if not isinstance(value, str):
        raise UserError(f"{where} has no text in {spec.field!r}; set text_field")
    return plain_text(value, where)


def read(value: Any, spec: SourceSpec) -> bool:
    """Whether a row of a table is read: texts that are null are left out, conversations that are null are refused."""
    return value is not None or spec.messages_field is not None


def refuse_missing(names: Sequence[str], spec: SourceSpec, where: str) -> None:
    """Refuse a table without the column.

    Raises:
        UserError: names those that it has.
    """
    if spec.field not in names:
        key = "text_field" if spec.messages_field is None else "messages_field"
        raise UserError(f"{where} has no column {spec.field!r} but {list(names)}; set {key}")
