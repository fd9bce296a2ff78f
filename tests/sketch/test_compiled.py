import pytest
import torch
from hypothesis import given, settings
from strategies import layers
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, build_plan, project, query
from usllm.sketch.compiled import VARIABLE, usable

pytest.importorskip("numba")


def both(weight: Tensor, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    found = []
    for kernels in ("torch", "numba"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, kernels)
            winners = torch.zeros(plan.num_states, dtype=torch.int16)
            states = project(weight, plan, winners=winners)
            found.append(({**states, "winners": winners}, query(states, plan)))
    return found[0][0], found[1][0], found[0][1], found[1][1]


@given(layers(operator="absmaxmin", query="magnitude_max"))
@settings(max_examples=150, deadline=None)
def test_compiled_equals_the_reference_bit_for_bit(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, _ = layer
    reference, compiled, expected, decoded = both(weight, plan)
    assert all(torch.equal(reference[name], compiled[name]) for name in reference)
    assert torch.equal(expected, decoded)


def test_compiled_equals_the_reference_on_a_non_contiguous_weight_of_two_group_sizes() -> None:
    weight = torch.randn(70, 1300).t()
    plan = build_plan((1300, 70), torch.rand(70) ** 6, SketchConfig(bits_per_weight=1.0), "layer")
    assert len(plan.spans) == 2
    reference, compiled, expected, decoded = both(weight, plan)
    assert torch.equal(reference["codes"], compiled["codes"])
    assert torch.equal(expected, decoded)


def test_other_operators_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "numba")
    for fields in ({"operator": "mean"}, {"operator": "countmin"}, {"query": "signed_max"}):
        plan = build_plan((64, 32), None, SketchConfig(bits_per_weight=2.0, **fields), "layer")  # type: ignore[arg-type]
        assert not usable(plan, torch.device("cpu"))


def test_an_impossible_choice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan((64, 32), None, SketchConfig(bits_per_weight=2.0), "layer")
    monkeypatch.setenv(VARIABLE, "fortran")
    with pytest.raises(ValueError, match=r"USLLM_CPU_KERNELS=fortran.*auto, numba or torch"):
        usable(plan, torch.device("cpu"))
    monkeypatch.setenv(VARIABLE, "numba")
    monkeypatch.setattr("usllm.sketch.compiled._kernels", lambda: None)
    with pytest.raises(ValueError, match="pip install numba"):
        usable(plan, torch.device("cpu"))
