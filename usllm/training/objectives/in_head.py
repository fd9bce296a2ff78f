"""Losses of logits that never exist whole: computed inside of a model's head, some positions at a time.

``[tokens, vocabulary]`` is the largest thing in a training step, and with a teacher's beside it and their gradients it
decides its memory. A loss is a sum over positions, so logits are made, used and differentiated for a few positions at
a time, and what is kept is the gradient of the hidden states. All of it happens in the head's own forward pass, where
its weight is whole even when the model is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usllm.compress.values import compute_dtype
from usllm.system.errors import UserError
from usllm.training.objectives import base

ChunkLoss = Callable[..., Tensor]
"""From logits [rows, vocabulary] and the same rows of other tensors to sums over the rows, one for each part, fp32."""

_AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
)
"""Keys of configurations of families that change logits behind the head."""


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The head of a model whose logits are what its head gives, and nothing else; ``None`` for any other."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    changed = any(getattr(config, key, None) not in (None, 1, 1.0) for key in _AFTER_THE_HEAD)
    return head if type(head) is nn.Linear and not changed else None


def parts_in_head(
    model: nn.Module, function: ChunkLoss, weights: Tensor, *others: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor, Any]:
    """A weighted sum of losses of a model's logits.

    Args:
        model: With a :func:`plain_head`.
        function: Takes a chunk of logits and the same rows of ``others``.
        weights: Of the parts, fp32 [parts].
        others: [tokens, ...], in the order of the flattened positions.
        arguments: That the model is called with.

    Returns:
        ``weights · parts`` with a graph, the parts, detached, and the model's output, whose ``logits`` mean nothing.

    Raises:
        UserError: The model changes what its head gives.
    """
    head = plain_head(model)
    assert head is not None
    found: list[Tensor] = []

    def losses(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, -2)
        dtype = compute_dtype(flat)
        total, parts = _HeadLoss.apply(function, weights, dtype, flat, head.weight, head.bias, *others)
        found.append(parts.detach())
        # Families take the last positions of it, or look at its type; FSDP2 wants no view.
        given = total.expand(*hidden.shape[:-1], 1).clone()
        found.append(given.detach())
        return given

    with _forward(head, losses):
        output = model(**arguments)
    _refuse_changed(model, found[1], output.logits)
    # The total as the model returns it: FSDP2 gathers the weights of a part again when the gradient of what that part
    # has returned arrives, and the part around all others returns nothing else that the loss depends on.
    return output.logits.flatten()[0], found[0], output


def hidden_in_head(model: nn.Module, **arguments: Any) -> tuple[Tensor, Any]:
    """What the head of a model is given, [..., hidden], and the model's output, whose ``logits`` are that too.

    Raises:
        UserError: The model changes what its head gives.
    """
    head = plain_head(model)
    assert head is not None
    found: list[Tensor] = []

    def seen(hidden: Tensor) -> Tensor:
        found.append(hidden.detach())
        return hidden

    with _forward(head, seen):
        output = model(**arguments)
    _refuse_changed(model, found[0], output.logits)
    return output.logits, output


def _refuse_changed(model: nn.Module, given: Tensor, returned: Tensor) -> None:
    """Refuse a family that does something to logits and is not known for it: its loss would be changed in their place.

    Raises:
        UserError: It did.
    """
    returned = returned.detach()
    if returned.data_ptr() != given.data_ptr() and not torch.equal(returned, given.to(returned.dtype)):
        raise UserError(
            f"objective: {type(model).__name__} changes what its head gives, in a way that usllm does not know: its "
            "loss needs whole logits, and its key among those of usllm/training/objectives/in_head.py"
        )


@contextmanager
def _forward(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = function
    try:
        yield
    finally:
        del head.forward  # the class's own again


class _HeadLoss(torch.autograd.Function):
    """The sum over chunks, with all gradients computed beside it; logits are made once."""

    @staticmethod
    def forward(
        ctx: Any,
        function: ChunkLoss,
        weights: Tensor,
        dtype: torch.dtype,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, base.CHUNK_ELEMENTS // weight.shape[0])
        wanted = [ctx.needs_input_grad[3], ctx.needs_input_grad[4], bias is not None and ctx.needs_input_grad[5]]
        cast = [None if t is None else t.detach().to(dtype) for t in (weight, bias)]
        parts = torch.zeros_like(weights)
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if want and tensor is not None else None
            for want, tensor in zip(wanted, (None, weight, bias), strict=True)
        ]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            leaves = [None if t is None else t.detach() for t in (hidden[part].to(dtype), *cast)]
            asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
            for leaf in asked:
                leaf.requires_grad_()
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(leaves[0], leaves[1], leaves[2])  # type: ignore[arg-type]
                values = function(logits, *(other[part] for other in others))
                total = (values * weights).sum()
            parts += values.detach()
            if not asked:
                continue
            got = iter(torch.autograd.grad(total, asked))
            if of_hidden is not None:
                of_hidden[part] = next(got)
            for gradient in gradients[1:]:
                if gradient is not None:
                    gradient += next(got)
        ctx.gradients = [of_hidden, *gradients[1:]]
        ctx.mark_non_differentiable(parts)
        return (parts * weights).sum(), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a loss in the head is handed out once: it is scaled in place")
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return None, None, None, *scaled, *[None] * (len(ctx.needs_input_grad) - 6)
