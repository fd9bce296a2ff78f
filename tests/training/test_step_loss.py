"""A step's loss is the mean over its targets, however its sequences are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import load_model
from torch import Tensor, nn

from usllm.data.batches import NO_TARGET, in_parts
from usllm.training.objectives import CrossEntropy, Distill, Objective, learnt
from usllm.training.step_loss import StepLoss

IDS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
LEARNT = torch.tensor([1, 2, 11, 0])  # targets of each sequence: no micro batch has as many as another, one has none


def masked() -> dict[str, Tensor]:
    places = torch.arange(12).expand(4, -1)
    return {"input_ids": IDS, "labels": IDS.where((places > 0) & (places <= LEARNT[:, None]), NO_TARGET)}


def student_of(objective: Objective) -> nn.Module:
    torch.manual_seed(0)
    model = load_model().eval()
    objective.attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def step(objective: Objective, batches: list[dict[str, Tensor]]) -> tuple[dict[str, float], list[Tensor]]:
    model = student_of(objective)
    optimizer, losses = torch.optim.SGD(model.parameters()), StepLoss()
    for batch in batches:
        loss, parts = objective.loss(model, batch)
        (loss / len(batches)).backward()
        losses.add(batch, loss, parts)
    means = losses.finish_(optimizer, lambda share: share)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return {name: float(value) for name, value in means.items()}, gradients


@pytest.mark.parametrize(
    "build",
    [CrossEntropy, lambda: Distill(hidden_weight=0.0), lambda: Distill(hidden_weight=0.0, cross_entropy_weight=0.3)],
    ids=["cross-entropy", "logits", "logits and cross-entropy"],
)
def test_micro_batches_of_unequal_targets_make_the_step_of_one_batch(build: Any) -> None:
    """Hidden states are left out: their floor is a share of the median over a micro batch."""
    whole, gradients = step(build(), [masked()])
    split, others = step(build(), in_parts(masked(), 1))
    assert split == pytest.approx(whole, rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_targets() -> None:
    batch = masked()
    found, _ = step(CrossEntropy(), [batch])
    logits = student_of(CrossEntropy())(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=NO_TARGET)
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_divergence_is_that_of_positions_whose_next_token_is_learnt() -> None:
    batch, objective = masked(), Distill(hidden_weight=0.0)
    model = student_of(objective)
    assert objective.teacher is not None
    ours, theirs = (net(input_ids=IDS).logits.log_softmax(-1) for net in (model, objective.teacher))
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    counted = torch.cat([batch["labels"][:, 1:] != NO_TARGET, torch.zeros(4, 1, dtype=torch.bool)], 1)
    loss, parts = objective.loss(model, batch)
    expected = float((each * counted).sum().detach()) / (IDS.numel() - len(IDS))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(parts["kl"]) == pytest.approx(expected, rel=1e-4)


def test_hidden_states_of_what_is_not_learnt_do_not_count() -> None:
    objective = Distill(kl_weight=0.0, hidden_weight=1.0)
    model, none = student_of(objective), {"input_ids": IDS, "labels": torch.full_like(IDS, NO_TARGET)}
    assert float(objective.loss(model, none)[0].detach()) == 0.0
    assert float(objective.loss(model, {"input_ids": IDS, "labels": IDS})[0].detach()) == pytest.approx(
        float(objective.loss(model, {"input_ids": IDS})[0].detach())
    )


def test_a_step_in_which_all_is_learnt_is_left_as_it_was() -> None:
    model = student_of(CrossEntropy())
    loss, parts = CrossEntropy().loss(model, {"input_ids": IDS})
    loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    losses = StepLoss()
    losses.add({"input_ids": IDS, "labels": IDS}, loss, parts)
    assert float(learnt({"input_ids": IDS})) == 1.0
    assert torch.equal(losses.finish_(torch.optim.SGD(model.parameters()), lambda share: share)["loss"], loss.detach())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, after, before))


def test_a_step_without_targets_changes_nothing() -> None:
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, NO_TARGET)}
    found, gradients = step(CrossEntropy(), [batch])
    assert found == {"loss": 0.0}
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
