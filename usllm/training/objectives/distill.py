"""Distillation from the dense model: token distributions, hidden states, and the text itself, each with a weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from usllm.data.batches import NO_TARGET, model_inputs
from usllm.system.errors import UserError
from usllm.training.objectives.base import Batch, Objective, sum_over_chunks
from usllm.training.objectives.in_head import ChunkLoss, hidden_in_head, parts_in_head, plain_head

ENERGY_FLOOR = 0.1
"""Least teacher energy of a position, as a share of the layer's median: a silent one (padding tokens embed to zero)
must neither divide by zero nor outweigh all others."""


class Distill(Objective):
    """``kl_weight · KL + hidden_weight · hidden + cross_entropy_weight · cross-entropy`` against the dense teacher.

    - *KL* is the forward divergence ``KL(teacher ‖ student)`` of the next-token distributions at ``temperature`` T,
      times T² (which keeps the gradient's scale independent of T), meaned over all positions; where something is
      masked, summed over those whose next token is learnt, and divided by the number of places behind the first.
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
        labels = batch.get("labels", input_ids)
        names = [
            key for key, weight in (("kl", self.kl_weight), ("cross_entropy", self.cross_entropy_weight)) if weight
        ]
        arguments = {**model_inputs(batch), "use_cache": False, "output_hidden_states": self.hidden_weight > 0}
        in_head = bool(names) and plain_head(model) is not None and plain_head(self.teacher) is not None
        # Places without a target count in the divisor, as the last ones do.
        targets = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET).flatten()
        whole = (labels != NO_TARGET).all() & ("position_ids" not in batch)
        counted = (targets != NO_TARGET) | whole
        places = input_ids.numel() - len(input_ids) * ~whole
        others, teacher = [targets, counted], None
        if self.kl_weight or self.hidden_weight:
            with torch.no_grad():
                if in_head:
                    scores, teacher = hidden_in_head(self.teacher, **arguments)
                else:
                    teacher = self.teacher(**arguments)
                    scores = teacher.logits
            others.append(scores.flatten(0, 1))
        divisors = {"kl": places, "cross_entropy": places.new_tensor(input_ids.numel() - len(input_ids))}
        weights = {"kl": self.kl_weight * self.temperature**2, "cross_entropy": self.cross_entropy_weight}
        factors = torch.stack([weights[name] / divisors[name] for name in names]) if names else places.new_zeros(0)
        function = self._parts(names, self._teacher_head() if in_head and self.kl_weight else None)
        if in_head:
            total, sums, student = parts_in_head(model, function, factors, *others, **arguments)
        else:
            student = model(**arguments)
            total, sums = student.logits.new_zeros((), dtype=torch.float32), factors.new_zeros(len(names))
            for number, name in enumerate(names):
                one = self._parts([name], None)
                value = sum_over_chunks(
                    lambda *chunk, one=one: one(*chunk).sum(), student.logits.flatten(0, 1), *others
                )
                total, sums[number] = total + value * factors[number], value.detach()
        parts = dict(zip(names, sums * factors, strict=True))
        parts = {name: part / getattr(self, f"{name}_weight") for name, part in parts.items()}
        if self.hidden_weight:
            assert teacher is not None
            seen = counted.view_as(labels), places
            parts["hidden"] = hidden_state_error(student.hidden_states[1:], teacher.hidden_states[1:], *seen)
            total = total + self.hidden_weight * parts["hidden"]
        return total, {name: part.detach() for name, part in parts.items()}

    def _teacher_head(self) -> tuple[Tensor, Tensor | None]:
        head = plain_head(cast(nn.Module, self.teacher))
        assert head is not None
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        return _whole(weight), None if bias is None else _whole(bias)

    def _parts(self, names: Sequence[str], teacher_head: tuple[Tensor, Tensor | None] | None) -> ChunkLoss:
        """Sums over positions of the parts that logits decide, in the order of ``names``."""

        def sums(logits: Tensor, targets: Tensor, counted: Tensor, scores: Tensor | None = None) -> Tensor:
            found = []
            if "kl" in names and scores is not None:
                if teacher_head is not None:
                    weight, bias = teacher_head
                    scores = F.linear(scores.to(weight.dtype), weight, bias)
                log_student = (logits.float() / self.temperature).log_softmax(-1)
                log_teacher = (scores.float() / self.temperature).log_softmax(-1)
                divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
                found.append((divergence * counted).sum())
            if "cross_entropy" in names:
                found.append(F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=NO_TARGET))
            return torch.stack(found)

        return sums


def hidden_state_error(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    counted: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Mean over layers and positions of ``‖student - teacher‖² / ‖teacher‖²``, the divisor floored.

    Args:
        student, teacher: one ``[sequences, context, width]`` tensor per layer, any floating dtype.
        counted: bool ``[sequences, context]``; errors of other positions count as none. ``None``: all count.
        places: what their sum is divided by, with ``counted``.

    Returns:
        fp32 scalar: 0 for equal states, 1 where the student's states are zero.
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        energy = theirs.square().sum(-1)
        energy = energy.clamp_min(ENERGY_FLOOR * energy.median()).clamp_min(torch.finfo(torch.float32).eps)
        error = (ours.float() - theirs).square().sum(-1) / energy
        errors.append(error.mean() if counted is None or places is None else (error * counted).sum() / places)
    return torch.stack(errors).mean()


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded; gathering it is something that all ranks do."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
