from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_run import load_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from usllm.system.errors import UserError
from usllm.training.objectives import Distill, base, distill, next_token_loss
from usllm.training.objectives.distill import hidden_state_error
from usllm.training.objectives.in_head import plain_head

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def student_and(objective: Distill) -> nn.Module:
    """A student that differs from the attached teacher."""
    teacher = load_model()
    objective.attach(teacher)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher.eval()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = (teacher / temperature).softmax(-1)
    terms = p * ((teacher / temperature).log_softmax(-1) - (student / temperature).log_softmax(-1))
    return terms.sum(-1).mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [5, 1000])
def test_divergence_equals_its_definition(temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", rows * 264)
    objective = Distill(temperature=temperature, hidden_weight=0.0)
    student = student_and(objective)
    assert objective.teacher is not None
    loss, parts = objective.loss(student, {"input_ids": IDS})
    expected = divergence(student(input_ids=IDS).logits, objective.teacher(input_ids=IDS).logits, temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["kl"], expected.detach())


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    objective = Distill(kl_weight=0.5, hidden_weight=3.0, cross_entropy_weight=0.25)
    loss, parts = objective.loss(student_and(objective), {"input_ids": IDS})
    assert set(parts) == {"kl", "hidden", "cross_entropy"}
    torch.testing.assert_close(loss.detach(), 0.5 * parts["kl"] + 3.0 * parts["hidden"] + 0.25 * parts["cross_entropy"])


def test_cross_entropy_part_is_the_loss_on_the_text() -> None:
    objective = Distill(kl_weight=0.0, hidden_weight=0.0, cross_entropy_weight=1.0)
    student = student_and(objective)
    loss, _ = objective.loss(student, {"input_ids": IDS})
    torch.testing.assert_close(loss, next_token_loss(student(input_ids=IDS).logits, IDS))


def test_student_equal_to_the_teacher_has_no_distillation_loss() -> None:
    objective = Distill(hidden_weight=1.0)
    model = load_model().eval()
    objective.attach(model)
    loss, _ = objective.loss(model, {"input_ids": IDS})
    assert loss.abs() < 1e-6


def test_hidden_error_is_one_for_silent_layers_whatever_their_size() -> None:
    teacher = (1e3 * torch.randn(2, 5, 8).sign(), 1e-1 * torch.randn(2, 5, 8).sign())
    silent = tuple(torch.zeros_like(layer) for layer in teacher)
    torch.testing.assert_close(hidden_state_error(silent, teacher), torch.tensor(1.0))


def test_hidden_error_weighs_a_position_of_large_norm_like_any_other() -> None:
    teacher = torch.ones(1, 4, 8)
    teacher[:, 0] *= 1000
    student = teacher.clone()
    student[:, 3] = 0
    torch.testing.assert_close(hidden_state_error((student,), (teacher,)), torch.tensor(0.25))


def test_hidden_error_of_a_silent_teacher_position_is_bounded() -> None:
    teacher = torch.ones(1, 4, 8)
    teacher[:, 2] = 0
    student = torch.ones(1, 4, 8)
    error = hidden_state_error((student,), (teacher,))
    torch.testing.assert_close(error, torch.tensor(10 / 4))  # floored to a tenth of the median
    assert torch.isfinite(hidden_state_error((student,), (torch.zeros(1, 4, 8),)))


def test_hidden_error_leaves_the_embedding_out() -> None:
    objective = Distill(kl_weight=0.0, hidden_weight=1.0)
    student = student_and(objective)
    assert objective.teacher is not None
    loss, _ = objective.loss(student, {"input_ids": IDS})
    arguments: dict[str, Any] = {"input_ids": IDS, "output_hidden_states": True}
    ours, theirs = student(**arguments).hidden_states, objective.teacher(**arguments).hidden_states
    each = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(ours[1:], theirs[1:], strict=True)]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_teacher_is_frozen_and_no_gradient_reaches_it() -> None:
    objective = Distill(hidden_weight=1.0)
    student = student_and(objective).train()
    objective.loss(student, {"input_ids": IDS})[0].backward()
    assert objective.teacher is not None
    assert not objective.teacher.training
    assert all(not p.requires_grad and p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_teacher_keeps_the_dense_weights_while_the_student_moves() -> None:
    objective = Distill()
    student = student_and(objective)
    assert objective.teacher is not None
    before = load_model().state_dict()
    assert all(torch.equal(before[name], value) for name, value in objective.teacher.state_dict().items())
    assert not torch.equal(before["model.norm.weight"], student.state_dict()["model.norm.weight"])


def test_teacher_is_moved_to_the_compute_dtype() -> None:
    objective = Distill()
    objective.attach(load_model())
    objective.place(torch.device("cpu"), torch.bfloat16)
    assert objective.teacher is not None
    assert {p.dtype for p in objective.teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [5, 1000])
def test_loss_in_the_head_is_that_of_whole_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", rows * 264)
    objective = Distill(temperature=1.5, hidden_weight=0.5, cross_entropy_weight=0.25)
    student = student_and(objective)
    found = []
    for chunked in (True, False):
        if not chunked:
            monkeypatch.setattr(distill, "plain_head", lambda model: None)
        student.zero_grad()
        loss, parts = objective.loss(student, {"input_ids": IDS})
        loss.backward()
        found.append((loss.detach(), parts, [p.grad for p in student.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 5 * 264)
    objective = Distill(hidden_weight=0.0, cross_entropy_weight=1.0)
    student = student_and(objective)
    rows = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim and out.shape[-1] == 264:
                rows.add(out.numel() // 264)
            return out

    with Watch():
        objective.loss(student, {"input_ids": IDS})[0].backward()
    assert 5 in rows
    assert IDS.numel() not in rows


def test_family_that_changes_logits_behind_its_head_is_computed_with_whole_ones() -> None:
    model = load_model()
    assert plain_head(model) is not None
    model.config.final_logit_softcapping = 30.0
    assert plain_head(model) is None


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("RecurrentGemma", {"logits_soft_cap": 30.0}),
        ("FalconH1", {"lm_head_multiplier": 0.05}),
        ("xLSTM", {"output_logit_soft_cap": 30.0}),
    ],
)
def test_configurations_of_such_families_are_known_by_their_keys(family: str, settings: dict[str, float]) -> None:
    kind = getattr(transformers, f"{family}Config")
    (key,) = settings
    assert hasattr(kind(), key)  # the family still has it
    model = load_model()
    setattr(model.config, key, settings[key])
    assert plain_head(model) is None


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_family_that_nobody_knows_to_change_logits_is_refused(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Distill(hidden_weight=0.0)
    student = student_and(objective)
    changed: Any = student if whose == "student" else objective.teacher
    plain = changed.forward

    def halved(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(changed, "forward", halved)
    with pytest.raises(UserError, match=r"objective: LlamaForCausalLM changes what its head gives"):
        objective.loss(student, {"input_ids": IDS})


def test_gradient_points_from_student_to_teacher() -> None:
    student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[2.0, 0.0]])
    loss = Distill()._parts(["kl"], None)(student, torch.zeros(1), teacher).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, F.softmax(student, -1).detach() - teacher.softmax(-1))


def test_bad_arguments_are_all_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Distill(temperature=0, kl_weight=-1, hidden_weight=float("nan"))
    for key in ("temperature", "kl_weight=-1", "hidden_weight=nan"):
        assert f"objective.{key}" in str(caught.value)


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        Distill(kl_weight=0, hidden_weight=0)
