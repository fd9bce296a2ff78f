"""Values of any origin: said in print, and compared."""

from __future__ import annotations

from typing import Any


def check_version(key: str, given: Any, known: int) -> None:
    """Refuse a version of the format that this version of usllm does not read.

    Raises:
        ValueError: It is not ``known``; the message begins with ``key``.
    """
    if type(given) is not int or given != known:
        raise ValueError(
            f"{key}={shorten(given)}: this version of usllm reads {known}; upgrade usllm to read the model"
        )


def shorten(value: Any) -> str:
    """A value as printable ASCII of at most 80 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep, or a number too long to print
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"
