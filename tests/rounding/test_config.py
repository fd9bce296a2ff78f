"""Every bad option of rounding is named."""

from __future__ import annotations

import pytest

from usllm.rounding import RoundingConfig


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 5}, "sketch.bits=5"),
        ({"bits": True}, "sketch.bits=True"),
        ({"bits": "4"}, "sketch.bits='4'"),
        ({"bits": 4, "bits_per_weight": 4.0}, "sketch.bits_per_weight=4.0"),
        ({"bits_per_weight": 1.0}, "sketch.bits_per_weight=1.0"),
        ({"bits_per_weight": 0}, "sketch.bits_per_weight=0"),
        ({"bits_per_weight": 17}, "sketch.bits_per_weight=17"),
        ({"bits_per_weight": float("nan")}, "sketch.bits_per_weight=nan"),
        ({"group_size": 0}, "sketch.group_size=0"),
        ({"group_size": 1.5}, "sketch.group_size=1.5"),
        ({"scales": "absmax"}, "sketch.scales='absmax'"),
        ({"layer_budget": "importance"}, "sketch.layer_budget='importance'"),
    ],
)
def test_bad_option_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=r"^sketch\.") as raised:
        RoundingConfig(**options)  # type: ignore[arg-type]
    assert str(raised.value).startswith(named)
    assert "\n" not in str(raised.value)
