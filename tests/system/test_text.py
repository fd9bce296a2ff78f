from __future__ import annotations

import pytest

from usllm.system.text import perplexity_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.114, "27.11"), (934.34, "934.34"), (4061.03, "4,061"), (8.4e6, "8.40e+06"), (float("inf"), "inf")],
)
def test_perplexities_are_readable(value: float, text: str) -> None:
    assert perplexity_text(value) == text


def test_what_was_not_measured_is_said() -> None:
    assert perplexity_text(None) == "-"
    assert perplexity_text(None, "not measured") == "not measured"
