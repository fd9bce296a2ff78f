from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_run import load_model
from torch import Tensor

from usllm.training.objectives import base, next_token_loss


def test_next_token_loss_equals_the_model_library_s_own() -> None:
    model = load_model().eval()
    input_ids = torch.randint(0, 256, (3, 17))
    output = model(input_ids=input_ids, labels=input_ids)
    torch.testing.assert_close(next_token_loss(output.logits, input_ids), output.loss)


def test_next_token_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    logits, input_ids = torch.randn(2, 9, 11).bfloat16(), torch.randint(0, 11, (2, 9))
    loss = next_token_loss(logits, input_ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(logits.float(), input_ids))


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_chunks_change_neither_loss_nor_gradient(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, input_ids = torch.randn(2, 6, 13, requires_grad=True), torch.randint(0, 13, (2, 6))
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", rows * 13)
    chunked = next_token_loss(logits, input_ids)
    torch.testing.assert_close(next_token_loss(logits.detach(), input_ids), whole)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, logits)[0], gradient)


def test_no_more_rows_than_a_chunk_are_upcast_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 4 * 50)
    seen: list[int] = []

    def function(scores: Tensor) -> Tensor:
        seen.append(len(scores))
        return scores.float().square().sum()

    scores = torch.randn(10, 50).bfloat16().requires_grad_()
    base.sum_over_chunks(function, scores).backward()
    with torch.no_grad():
        base.sum_over_chunks(function, scores)
    assert seen == [4, 4, 2, 4, 4, 2]
    assert scores.grad is not None
    assert scores.grad.dtype == torch.bfloat16


def test_second_backward_through_one_loss_is_refused() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    loss = base.sum_over_chunks(lambda chunk: chunk.square().sum(), scores)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()
