from __future__ import annotations

import pytest

from usllm.system.text import human_seconds, perplexity_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.114, "27.11"), (934.34, "934.34"), (4061.03, "4,061"), (8.4e6, "8.40e+06"), (float("inf"), "inf")],
)
def test_perplexities_are_readable(value: float, text: str) -> None:
    assert perplexity_text(value) == text


def test_what_was_not_measured_is_said() -> None:
    assert perplexity_text(None) == "-"
    assert perplexity_text(None, "not measured") == "not measured"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (245, "4 min 05 s"), (12_000, "3 h 20 min")]
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
