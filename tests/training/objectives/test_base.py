from __future__ import annotations

import pytest
import torch
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
    whole = next_token_loss(logits, input_ids)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", rows * 13)
    chunked = next_token_loss(logits, input_ids)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, logits)[0], gradient)


def test_chunks_keep_no_fp32_softmax_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, input_ids = torch.randn(2, 33, 50).bfloat16().requires_grad_(), torch.randint(0, 50, (2, 33))
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 4 * 50)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(logits, input_ids)
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and tensor.ndim == 2]
