"""The one form of text that all sources give, whatever wrote it."""

from __future__ import annotations

import re

from usllm.system.errors import UserError

_BYTE_ORDER_MARK = "\ufeff"
_REFUSED = re.compile("[\x00\ud800-\udfff]")


def plain_text(text: str, where: str) -> str:
    """``text`` without a byte order mark at its start, every line end as ``\\n``; otherwise unchanged.

    So a text gives the same tokens as a text file, a JSON string, a column of Parquet, or a row from the hub.

    Args:
        text: as it was stored.
        where: file and line or row, for messages.

    Raises:
        UserError: it holds NUL or half of a surrogate pair, which no tokenizer is trained on and UTF-8 cannot hold.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (found := _REFUSED.search(text)) is not None:
        what = "a NUL character" if found[0] == "\x00" else f"half of a surrogate pair (\\u{ord(found[0]):04x})"
        raise UserError(f"{where} holds {what} at character {found.start()}; remove it, or convert the text to UTF-8")
    return text
