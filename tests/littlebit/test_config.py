"""Every bad option of binary factors is named."""

from __future__ import annotations

import pytest

from usllm.littlebit import LittleBitConfig


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits_per_weight": 0.0}, "sketch.bits_per_weight=0.0"),
        ({"bits_per_weight": None}, "sketch.bits_per_weight=None"),
        ({"bits_per_weight": float("inf")}, "sketch.bits_per_weight=inf"),
        ({"paths": 3}, "sketch.paths=3"),
        ({"paths": True}, "sketch.paths=True"),
        ({"slope": -1.0}, "sketch.slope=-1.0"),
    ],
)
def test_bad_option_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=r"^sketch\.") as raised:
        LittleBitConfig(**options)  # type: ignore[arg-type]
    assert str(raised.value).startswith(named)
