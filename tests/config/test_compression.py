"""One group for every method: its options are checked, those of another one are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composing import composed

from usllm.config import AllocationConfig, check_train, compressor_of, plain_config, sketch_config
from usllm.littlebit import LittleBitConfig
from usllm.rounding import RoundingConfig
from usllm.runs.finetune import refuse_other_configuration
from usllm.sketch import SketchConfig
from usllm.system.errors import UserError

NONE = AllocationConfig(name=None)


def config_of(text: Path, *overrides: str) -> Any:
    return check_train(composed("experiment=tiny", f"data.train.path={text}", *overrides))


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["sketch=rounding"], RoundingConfig()),
        (["sketch=rounding", "sketch.bits=1", "sketch.group_size=128"], RoundingConfig(bits=1, group_size=128)),
        (["sketch=rounding", "sketch.bits_per_weight=2.5"], RoundingConfig(bits_per_weight=2.5)),
        (["sketch=littlebit", "sketch.bits_per_weight=1"], LittleBitConfig(bits_per_weight=1.0)),
        (["sketch=littlebit", "allocation.layer_budget=importance"], LittleBitConfig(layer_budget="importance")),
        (["sketch=absmaxmin", "sketch.rows=1"], SketchConfig(rows=1)),
        (
            ["sketch=sign"],
            SketchConfig(
                operator="mean",
                rows=1,
                state_bits=1,
                rounding="nearest",
                output_scale=True,
                train_output_scale=True,
                allocation="waterfill",
                price_list="trained",
                straight_through="state",
            ),
        ),
        (
            ["sketch=mean", "allocation=trained", "allocation.price_exponent=2"],
            SketchConfig(
                operator="mean",
                rows=1,
                rounding="nearest",
                allocation="waterfill",
                price_list="trained",
                price_exponent=2.0,
            ),
        ),
        (["allocation=uniform"], SketchConfig(bits_per_weight=1.0, rows=2, group_size=64, allocation="uniform")),
    ],
)
def test_option_of_the_group_chooses_method_options_and_allocation(
    overrides: list[str], options: object, tiny_text: Path
) -> None:
    assert sketch_config(config_of(tiny_text, *overrides)) == options


def test_experiment_demo_leaves_the_method_to_the_command_line() -> None:
    demo = sketch_config(check_train(composed("experiment=demo")))
    assert (demo.operator, demo.bits_per_weight, demo.layer_budget) == ("mean", 1.0, "sensitivity")
    for name, options in (("littlebit", LittleBitConfig()), ("rounding", RoundingConfig())):
        assert sketch_config(check_train(composed("experiment=demo", f"sketch={name}"))) == options


def test_configuration_without_a_method_is_that_of_a_sketch() -> None:
    assert compressor_of({"rows": 2}, AllocationConfig()).options == SketchConfig(rows=2)


@pytest.mark.parametrize(
    ("sketch", "allocation", "message"),
    [
        (
            {"method": "littlebit", "rows": 3},
            NONE,
            "sketch.rows=3: belongs to method sketch; littlebit has bits_per_weight, paths, slope",
        ),
        (
            {"method": "rounding", "paths": 2},
            NONE,
            "sketch.paths=2: belongs to method littlebit; rounding has bits, bits_per_weight, group_size, scales",
        ),
        (
            {"method": "littlebit", "group_size": 8},
            NONE,
            "sketch.group_size=8: belongs to method rounding and sketch; littlebit has bits_per_weight, paths, slope",
        ),
        ({"method": "littlebit", "path": 2}, NONE, "sketch.path=2: unknown key; did you mean sketch.paths?"),
        (
            {"method": "littlebot"},
            NONE,
            "sketch.method='littlebot' is unknown: did you mean littlebit? (a plug-in's method needs plugins=[…])",
        ),
        (
            {"method": "littlebit", "rows": 3, "hash": "shared", "query": "signed_max"},
            NONE,
            "sketch.method='littlebit': rows, hash, query belong to other methods; choose the whole option, as "
            "sketch=littlebit",
        ),
        (
            {"method": "littlebit"},
            AllocationConfig(),
            "allocation.name='proportional': method littlebit shares nothing out over channels; pass allocation=none",
        ),
        (
            {"method": "rounding"},
            AllocationConfig(name=None, min_importance=0.1),
            "allocation.min_importance=0.1: method rounding shares nothing out over channels; pass allocation=none",
        ),
        (
            {"method": "rounding"},
            AllocationConfig(name=None, layer_budget="importance"),
            "allocation.layer_budget='importance': rounding has one width for all layers; leave it at equal",
        ),
        (
            {"method": "littlebit"},
            AllocationConfig(name=None, layer_budget="more"),
            "allocation.layer_budget='more' is unknown: choose one of equal, importance",
        ),
        (
            {"method": "rounding"},
            AllocationConfig(name=None, price_list="trained"),
            "allocation.price_list='trained': method rounding shares nothing out over channels; pass allocation=none",
        ),
        (
            {"rows": 1},
            AllocationConfig(price_list="trained"),
            "allocation.price_list='trained' is read by waterfill alone",
        ),
        ({}, NONE, "allocation.name=None is unknown: choose one of "),
        ({"method": "rounding", "bits": "four"}, NONE, "sketch.bits=four: must be a whole number or null"),
    ],
)
def test_refused_in_one_line(sketch: dict[str, Any], allocation: AllocationConfig, message: str) -> None:
    with pytest.raises(UserError) as raised:
        compressor_of(sketch, allocation)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sketch", "allocation", "kind"),
    [
        ({"operator": "mine"}, AllocationConfig(), "operator"),
        ({}, AllocationConfig(name="mine"), "rule"),
        ({}, AllocationConfig(layer_budget="mine"), "rule"),
        ({"method": "mine"}, NONE, "method"),
    ],
)
def test_name_that_a_plug_in_may_bring_is_told_so(
    sketch: dict[str, Any], allocation: AllocationConfig, kind: str
) -> None:
    with pytest.raises(UserError, match=rf"='mine' is unknown: .*a plug-in's {kind} needs plugins=\["):
        compressor_of(sketch, allocation)


def test_finished_run_without_a_method_is_not_another_configuration(tiny_text: Path) -> None:
    overrides = ["experiment=tiny", f"data.train.path={tiny_text}"]
    plain = plain_config(composed(*overrides))
    config = check_train(plain)
    old = {**plain, "sketch": {key: value for key, value in plain["sketch"].items() if key != "method"}}
    refuse_other_configuration({"config": old}, config, plain)
    other = plain_config(composed(*overrides, "sketch=littlebit"))
    with pytest.raises(UserError, match=r"sketch\.method: sketch in the finished run, littlebit in this one"):
        refuse_other_configuration({"config": old}, check_train(other), other)
