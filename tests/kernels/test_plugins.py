"""Operators, hashes and kernels that are registered from outside, after everything here was imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import assert_product, slow_interpreted, stream
from extremes import Extremes
from torch import Tensor

from usllm import sketch
from usllm.compress.methods.sketch import SketchCompressor
from usllm.sketch import Plan, SketchConfig, States, build_plan
from usllm.sketch.hash import HASHES, Balanced
from usllm.sketch.operators import OPERATORS
from usllm_kernels import choice_problem, dispatch, project, project_query, query, sketch_linear
from usllm_kernels.plans import flatten

SHAPE = (47, 13)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Crowded(Balanced):
    """Buckets of the lower half alone: states of the upper one stay without a member."""

    def bucket(self, table: Tensor, states: int) -> Tensor:
        return table % -(-states // 2)

    def slots(self, table: Tensor, order: Tensor, states: int) -> Tensor:
        used = -(-states // 2)
        filled = super().slots(table, order, used)
        return torch.nn.functional.pad(filled, (0, states - used), value=order.shape[1])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """``extremes`` is an operator, ``crowded`` a hash."""
    monkeypatch.setitem(OPERATORS, "extremes", Extremes())
    monkeypatch.setitem(HASHES, "crowded", Crowded())


def layer(device: torch.device | str = "cpu", **fields: Any) -> tuple[Tensor, Plan, Tensor, States]:
    """A weight, its plan, second moments, and its states by the reference."""
    generator = torch.Generator().manual_seed(0)
    second_moment = torch.rand(SHAPE[1], generator=generator) + 0.1
    weight = torch.randn(SHAPE, generator=generator)
    plan = build_plan(SHAPE, second_moment, SketchConfig(bits_per_weight=3.0, group_size=16, **fields), "layer")
    weight, second_moment = weight.to(device), second_moment.to(device)
    return weight, plan, second_moment, sketch.project(weight, plan, second_moment)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", [{}, {"output_scale": True, "allocation": "waterfill"}], ids=str)
def test_a_fourth_operator_computes_everything(device: str, fields: dict[str, Any]) -> None:
    weight, plan, second_moment, expected = layer(device, operator="extremes", **fields)
    decoded = sketch.query(expected, plan)
    states = project(weight, plan, second_moment)
    sums = torch.empty(2, SHAPE[1], device=device)
    latent = weight.clone().requires_grad_()
    again, both = project_query(latent, plan, second_moment, dtype=torch.bfloat16, sums=sums)
    for found in (states, again):
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    packed = {**expected, "codes": stream(expected, plan)}
    assert torch.equal(query(states, plan), decoded) and torch.equal(query(packed, plan), decoded)
    assert torch.equal(both, decoded.bfloat16())
    torch.testing.assert_close(sums[0], (decoded - weight).square().sum(0))
    both.float().sum().backward()
    assert latent.grad is not None and bool((latent.grad == 1).all())
    for tokens in (2, 20, 200):
        x = torch.randn(tokens, SHAPE[1], device=device, requires_grad=True)
        latent.grad = None
        y = sketch_linear(x, packed, plan, weight=latent)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        assert x.grad is not None and latent.grad is not None
        assert_product(y.detach(), x.detach(), decoded.t())
        assert_product(x.grad, gradient, decoded)
        assert_product(latent.grad, gradient.t(), x.detach())


@pytest.mark.usefixtures("registered")
def test_a_fourth_operator_is_compiled_whole() -> None:
    weight, plan, _, _ = layer(operator="extremes")
    x = torch.randn(3, SHAPE[1])

    def step(x: Tensor, weight: Tensor) -> Tensor:
        states, decoded = project_query(weight, plan)
        y = sketch_linear(x, project(weight, plan), plan, weight=weight)
        return y.square().sum() + decoded.sum() + query(states, plan).sum()

    values = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        arguments = x.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(*arguments)
        value.backward()
        values.append((value, *(argument.grad for argument in arguments)))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("registered")
def test_another_process_knows_it_by_name(tmp_path: Path) -> None:
    _, plan, _, states = layer(operator="extremes")
    torch.save([*flatten(plan), states, sketch.query(states, plan)], tmp_path / "call.pt")
    code = (
        "import sys, torch, usllm_kernels\n"
        "from usllm.sketch.operators import OPERATORS\n"
        "plan, numbers, states, decoded = torch.load(sys.argv[1], weights_only=True)\n"
        "ask = lambda: torch.ops.usllm.query(list(states.values()), plan, numbers, torch.float32, '')\n"
        "try:\n"
        "    ask()\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "OPERATORS['another'] = OPERATORS.pop('mean')  # neither order nor number is this process's\n"
        "import extremes\n"
        "print(torch.equal(ask(), decoded))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "call.pt")]
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": ":".join(str(path) for path in (root, root / "kernels", Path(__file__).parent))}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    refused, equal = done.stdout.splitlines()
    assert "sketch.operator='extremes' is unknown" in refused
    assert equal == "True"


@pytest.mark.usefixtures("registered")
def test_a_choice_that_has_no_kernel_for_it_is_refused(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, plan, _, states = layer(device, operator="extremes")
    calls = {
        "project": lambda chosen: project(weight, plan, backend=chosen),
        "query": lambda chosen: query(states, plan, backend=chosen),
        "project_query": lambda chosen: project_query(weight, plan, backend=chosen),
        "sketch_linear": lambda chosen: sketch_linear(weight, states, plan, backend=chosen),
    }
    assert set(calls) == set(dispatch.OF_LAYERS)
    for operation, call in calls.items():
        reason = dispatch.supports(operation, backend, plan)
        if backend == "torch":
            assert reason is None
            call(backend)
            continue
        assert reason is not None and "sketch.operator='extremes'" in reason
        with pytest.raises(ValueError, match=rf"backend='{backend}'.*'extremes'.*only absmaxmin, countmin, mean"):
            call(backend)
        with monkeypatch.context() as patch:
            patch.setenv(dispatch.VARIABLE, backend)
            with pytest.raises(ValueError, match=f"USLLM_KERNELS={backend}.*'extremes'.*auto"):
                call(None)


@pytest.mark.usefixtures("registered")
def test_a_choice_is_refused_before_any_plan_is_made(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SketchConfig(operator="extremes")
    assert choice_problem(config) is None
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    assert choice_problem(SketchConfig()) is None
    problems = SketchCompressor(config).problems()
    assert problems == [] if backend == "torch" else f"USLLM_KERNELS={backend} cannot compute" in problems[0]
    monkeypatch.setenv(dispatch.VARIABLE, "fortran")
    assert str(choice_problem(config)).startswith("USLLM_KERNELS=fortran is unknown")


def test_another_operator_of_a_known_name_is_not_computed_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "mean", Extremes())
    weight, plan, _, expected = layer(operator="mean")
    assert torch.equal(project(weight, plan)["codes"], expected["codes"])
    assert dispatch.supports("project", "numba", plan) is not None


@pytest.mark.usefixtures("registered", "poisoned")
@pytest.mark.parametrize("operator", [*slow_interpreted("absmaxmin", "countmin"), "mean"])
def test_a_registered_hash_needs_no_kernel(operator: str, backend: str, device: torch.device) -> None:
    weight, plan, _, expected = layer(device, hash="crowded", operator=operator)
    assert plan.has_empty_states and plan.occupancy() < 0.7
    states = project(weight, plan, backend=backend)
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    decoded = query(states, plan, backend=backend)
    assert torch.equal(decoded, sketch.query(expected, plan)) and decoded.isfinite().all()


@pytest.fixture
def own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registered", {})


@pytest.mark.usefixtures("registered", "own_cells")
def test_a_registered_kernel_computes_what_it_supports() -> None:
    asked: list[str] = []

    def supports(plan: Plan) -> str | None:
        return None if plan.config.operator == "extremes" else "it computes extremes alone"

    def compute(states: States, plan: Plan, dtype: torch.dtype) -> Tensor:
        asked.append(plan.config.operator)
        return sketch.query(states, plan).to(dtype)

    dispatch.register("query", "numba", SimpleNamespace(supports=supports, query=compute))
    for operator in ("extremes", "mean"):
        _, plan, _, states = layer(operator=operator)
        for chosen in (None, "numba"):
            assert torch.equal(query(states, plan, backend=chosen), sketch.query(states, plan))
    assert asked == ["extremes", "extremes"]


@pytest.mark.usefixtures("own_cells")
def test_a_kernel_that_is_registered_by_name_is_imported_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel_by_name.py").write_text(
        "import torch\n\ndef supports(plan):\n    return None\n\n"
        "def query(states, plan, dtype):\n    return torch.full(plan.shape, 5, dtype=dtype)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    dispatch.register("query", "numba", "kernel_by_name")
    _, plan, _, states = layer()
    assert torch.equal(query(states, plan, backend="torch"), sketch.query(states, plan))
    assert "kernel_by_name" not in sys.modules
    assert bool((query(states, plan, backend="numba") == 5).all())
    del sys.modules["kernel_by_name"]


@pytest.mark.parametrize("cell", [("decode", "numba"), ("query", "fortran")], ids=str)
def test_a_kernel_for_no_cell_is_refused(cell: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"project, project_query, query, sketch_linear.*triton, numba, torch"):
        dispatch.register(*cell, SimpleNamespace(supports=lambda plan: None))


def test_the_folder_of_an_operation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import usllm_kernels.ops

    folder = tmp_path / "count_states"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "reference.py").write_text(
        "def supports(plan):\n    return None\n\ndef count_states(plan):\n    return plan.num_states\n"
    )
    monkeypatch.setattr(usllm_kernels.ops, "__path__", [*usllm_kernels.ops.__path__, str(tmp_path)])
    _, plan, _, _ = layer()
    cpu = torch.device("cpu")
    assert "count_states" in dispatch.operations()
    assert dispatch.implementation("count_states", plan, cpu).count_states(plan) == plan.num_states
    with pytest.raises(ValueError, match=r"backend='numba'.*count_states has no implementation"):
        dispatch.implementation("count_states", plan, cpu, "numba")
