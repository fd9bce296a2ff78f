import pytest

from usllm.sketch import SketchConfig, build_plan


def test_all_problems_come_in_one_message_with_key_value_and_way_out() -> None:
    with pytest.raises(ValueError, match="sketch") as error:
        SketchConfig(bits_per_weight=-1, rows=0, operator="median", state_bits=5, hash="md5")
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert any("sketch.bits_per_weight=-1" in line and "above 0" in line for line in lines)
    assert any("sketch.operator='median'" in line and "absmaxmin, countmin, mean" in line for line in lines)


@pytest.mark.parametrize(
    "values",
    [
        {"bits_per_weight": float("nan")},
        {"bits_per_weight": 0.0},
        {"rows": True},
        {"rows": 16},
        {"group_size": 4097},
        {"seed": -1},
        {"min_importance": float("inf")},
        {"operator": "mean", "query": "signed_max"},
    ],
)
def test_each_bad_value_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"sketch.{'query' if 'query' in values else next(iter(values))}="):
        SketchConfig(**values)  # type: ignore[arg-type]


def test_unknown_allocation_is_refused_where_it_is_used() -> None:
    with pytest.raises(ValueError, match=r"sketch\.allocation='greedy' is unknown: choose one of"):
        build_plan((256, 256), None, SketchConfig(allocation="greedy"), "layer")
