"""Distillation from the dense model: token distributions, hidden states, and the text itself, each with a weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from usllm.system.errors import UserError
from usllm.training.objectives.base import Batch, Objective, next_token_loss, sum_over_chunks

ENERGY_FLOOR = 0.1
"""Least teacher energy of a position, as a share of the layer's median: a silent one (padding tokens embed to zero)
must neither divide by zero nor outweigh all others."""


class Distill(Objective):
    """``kl_weight · KL + hidden_weight · hidden + cross_entropy_weight · cross-entropy`` against the dense teacher.

    - *KL* is the forward divergence ``KL(teacher ‖ student)`` of the next-token distributions at ``temperature`` T,
      times T² (which keeps the gradient's scale independent of T), meaned over all positions.
    - *hidden* is the squared error of each hidden vector over the teacher's squared norm of it, meaned over positions
      and then over layers (the embedding output is left out: it is no layer's output). It is normalised position by
      position because a Llama's first positions carry norms hundreds of times larger than all others, and over a whole
      tensor they would be the only ones that count.

    The teacher is a frozen copy of the model taken before surgery. It is in evaluation mode, gets no gradient, and is
    in no state dict.

    Args:
        temperature: T, above 0.
        kl_weight, hidden_weight, cross_entropy_weight: 0 or more, not all 0; a term of weight 0 is not computed.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 1.0,
        cross_entropy_weight: float = 0.0,
    ) -> None:
        weights = {
            "kl_weight": kl_weight,
            "hidden_weight": hidden_weight,
            "cross_entropy_weight": cross_entropy_weight,
        }
        problems = [f"objective.{key}={value}: must be 0 or more" for key, value in weights.items() if not value >= 0]
        if not temperature > 0:
            problems.append(f"objective.temperature={temperature}: must be above 0")
        if not any(weights.values()):
            problems.append(f"objective: {', '.join(weights)} are all 0, nothing would be trained")
        if problems:
            raise UserError("\n".join(problems))
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.hidden_weight = hidden_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.teacher: nn.Module | None = None

    def attach(self, dense: nn.Module) -> None:
        """Keep a frozen copy of the dense model as teacher."""
        self.teacher = copy.deepcopy(dense).eval().requires_grad_(False)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the teacher to ``device`` and ``dtype``; it is only read, so it needs no fp32 master copy."""
        if self.teacher is None:
            raise RuntimeError("Distill.attach has not been called: there is no teacher")
        self.teacher.to(device=device, dtype=dtype)

    def networks(self) -> list[nn.Module]:
        """The teacher."""
        return [] if self.teacher is None else [self.teacher]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.teacher is None:
            raise RuntimeError("Distill.attach has not been called: there is no teacher")
        input_ids = batch["input_ids"]
        arguments = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": self.hidden_weight > 0}
        student = model(**arguments)
        parts: dict[str, Tensor] = {}
        total = student.logits.new_zeros((), dtype=torch.float32)
        if self.kl_weight or self.hidden_weight:
            with torch.no_grad():
                teacher = self.teacher(**arguments)
            if self.kl_weight:
                parts["kl"] = self._divergence(student.logits, teacher.logits)
                total = total + self.kl_weight * parts["kl"]
            if self.hidden_weight:
                parts["hidden"] = hidden_state_error(student.hidden_states[1:], teacher.hidden_states[1:])
                total = total + self.hidden_weight * parts["hidden"]
        if self.cross_entropy_weight:
            parts["cross_entropy"] = next_token_loss(student.logits, input_ids)
            total = total + self.cross_entropy_weight * parts["cross_entropy"]
        return total, {name: part.detach() for name, part in parts.items()}

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        def chunk(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
            log_student = (student_rows.float() / self.temperature).log_softmax(-1)
            log_teacher = (teacher_rows.float() / self.temperature).log_softmax(-1)
            return torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)

        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        return sum_over_chunks(chunk, student, teacher) * self.temperature**2 / student.shape[0]


def hidden_state_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers and positions of ``‖student - teacher‖² / ‖teacher‖²``, the divisor floored.

    Args:
        student, teacher: one ``[sequences, context, width]`` tensor per layer, any floating dtype.

    Returns:
        fp32 scalar: 0 for equal states, 1 where the student's states are zero.
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        energy = theirs.square().sum(-1)
        energy = energy.clamp_min(ENERGY_FLOOR * energy.median()).clamp_min(torch.finfo(torch.float32).eps)
        errors.append(((ours.float() - theirs).square().sum(-1) / energy).mean())
    return torch.stack(errors).mean()
