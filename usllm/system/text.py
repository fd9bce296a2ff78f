"""Numbers as people read them, the same everywhere."""

from __future__ import annotations

import math


def perplexity_text(value: float | None, absent: str = "-") -> str:
    """A perplexity or a loss: two decimals; whole from 1,000 on; three digits where it is huge.

    Args:
        value: ``None`` where it was not measured.
        absent: What stands for that.
    """
    if value is None:
        return absent
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def human_seconds(seconds: float) -> str:
    """Such as ``12.3 s``, ``4 min 05 s`` or ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
