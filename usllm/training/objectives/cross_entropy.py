"""Next-token cross-entropy on the training text: the paper's objective."""

from __future__ import annotations

from torch import Tensor, nn

from usllm.training.objectives.base import Batch, Objective, next_token_loss


class CrossEntropy(Objective):
    """Mean next-token cross-entropy (nats per predicted token)."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        input_ids = batch["input_ids"]
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = next_token_loss(logits, input_ids)
        return loss, {}
