"""Next-token cross-entropy on the training text: the paper's objective."""

from __future__ import annotations

from torch import Tensor, nn

from usllm.data.batches import model_inputs
from usllm.training.objectives.base import Batch, Objective, next_token_loss


class CrossEntropy(Objective):
    """Mean next-token cross-entropy (nats per predicted token)."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(**model_inputs(batch), use_cache=False).logits
        return next_token_loss(logits, batch.get("labels", batch["input_ids"])), {}
