"""Reconstruct: block by block, the compressed block learns the dense block's output on the stream that reaches it.

Each decoder block is fed the student's stream, what the blocks before it made of the text, and is trained towards the
dense block's output on the dense stream (`docs/method.md` §6). All of the block's parameters are trained: latents with
a learning rate relative to their own size, everything else with one of its own. The loss of a token is relative to the
energy of its target, held above a share of the median so that silent tokens do not decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn

from usllm.compress import compressed_layers, reproject_, to_section
from usllm.models.identity import weights_digest
from usllm.stages.base import Stage, Work
from usllm.stages.block_state import BlockStates
from usllm.stages.blocks import capture, decoder_blocks, run_block
from usllm.system.errors import UserError
from usllm.system.modes import evaluating
from usllm.system.results import tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENERGY_FLOOR = 0.05
"""Of the median energy of a batch's targets: the least that a token's error is divided by."""


class Reconstruct(Stage):
    """Trains the blocks one after another.

    Args:
        sequences: Of the training text; 0 leaves the stage out.
        steps: Optimizer steps for each block.
        batch_size: Sequences of a step.
        latent_lr: Learning rate of latents, relative to their root mean square at the start.
        lr: Learning rate of everything else in the block.
        warmup_steps: Of a linear rise; a cosine follows it down to 0.
        save_every_n_steps: A kill costs at most these steps; finished blocks are never done again.

    Raises:
        UserError: A value is out of range.
    """

    name: ClassVar[str] = "reconstruct"

    def __init__(
        self,
        sequences: int = 128,
        steps: int = 100,
        batch_size: int = 8,
        latent_lr: float = 0.1,
        lr: float = 2e-3,
        warmup_steps: int = 10,
        save_every_n_steps: int = 50,
    ) -> None:
        values = {"steps": steps, "batch_size": batch_size, "save_every_n_steps": save_every_n_steps}
        for key, value in values.items():
            if value < 1:
                raise UserError(f"stages.reconstruct.{key}={value}: must be 1 or more")
        if sequences < batch_size:
            raise UserError(f"stages.reconstruct.sequences={sequences}: must be at least batch_size={batch_size}")
        if not (latent_lr > 0 and lr > 0):
            raise UserError(f"stages.reconstruct.latent_lr={latent_lr} and lr={lr} must be above 0")
        if not 0 <= warmup_steps <= steps:
            raise UserError(f"stages.reconstruct.warmup_steps={warmup_steps}: must be from 0 to steps={steps}")
        self.sequences, self.steps, self.batch_size = sequences, steps, batch_size
        self.latent_lr, self.lr, self.warmup_steps = latent_lr, lr, warmup_steps
        self.save_every_n_steps = save_every_n_steps

    def run(self, work: Work) -> None:
        """Train all blocks, or those that a killed run has left.

        Raises:
            UserError: The text is shorter than a batch.
        """
        tokens = [batch["input_ids"] for batch in work.batches(self.sequences)]
        tokens = [torch.cat(tokens[i : i + self.batch_size]) for i in range(0, len(tokens), self.batch_size)]
        tokens = [batch for batch in tokens if len(batch) == self.batch_size]
        if not tokens:
            raise UserError(f"stages.reconstruct.batch_size={self.batch_size}: the text has fewer sequences")
        teacher = work.load_dense().to(work.device).eval()
        states = BlockStates(
            None if work.folder is None else work.folder / self.name, work.writes, self._key(work, tokens)
        )
        with evaluating(work.model):  # the streams are those of a model that is measured, without dropout
            self._run_blocks(work, teacher, tokens, states)

    def _run_blocks(self, work: Work, teacher: nn.Module, tokens: list[Tensor], states: BlockStates) -> None:
        blocks, dense_blocks = decoder_blocks(work.model), decoder_blocks(teacher)
        with work.context():
            student, inputs = capture(work.model, blocks, tokens, work.device)
            dense, _ = capture(teacher, dense_blocks, tokens, work.device)
        with Progress(disable=not work.shows_progress, transient=True) as bar:
            task = bar.add_task("Reconstructing", total=len(blocks) * self.steps)
            for number, (block, dense_block) in enumerate(zip(blocks, dense_blocks, strict=True)):
                arguments = inputs[number]
                dense = list(run_block(dense_block, dense, arguments, work.context))
                bar.update(task, description=f"Reconstructing block {number + 1} of {len(blocks)}")
                if not states.load_finished(number, block):
                    self._train(work, number, block, student, dense, arguments, states)
                bar.advance(task, self.steps)
                student = list(run_block(block, student, arguments, work.context))

    def _train(
        self,
        work: Work,
        number: int,
        block: nn.Module,
        student: list[Tensor],
        targets: list[Tensor],
        arguments: dict[str, Any],
        states: BlockStates,
    ) -> None:
        optimizer = self._optimizer(block)
        first = states.load_unfinished(number, block, optimizer)
        order = batch_order(len(student), self.steps, work.seed + number)
        for step in range(first, self.steps):
            index = order[step]
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self._factor(step)
            with work.context():
                output = block(student[index], **arguments)
                output = output[0] if isinstance(output, tuple) else output
            _relative_error(output, targets[index]).backward()
            torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            reproject_(block)
            if (step + 1) % self.save_every_n_steps == 0 and step + 1 < self.steps:
                states.save_unfinished(number, block, optimizer, step + 1)
        states.save_finished(number, block)

    def _optimizer(self, block: nn.Module) -> torch.optim.Optimizer:
        latents = [tensor for layer in compressed_layers(block).values() for tensor in layer.latents.values()]
        known = {id(tensor) for tensor in latents}
        groups = [{"params": [tensor], "peak": self.latent_lr * _root_mean_square(tensor)} for tensor in latents]
        rest = [tensor for tensor in block.parameters() if id(tensor) not in known]
        groups.append({"params": rest, "peak": self.lr})
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def _factor(self, step: int) -> float:
        """Share of the learning rate at a step: a linear rise, then a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))

    def _key(self, work: Work, tokens: list[Tensor]) -> dict[str, Any]:
        """All that decides the bits of a reconstructed block, the model that it begins with included."""
        return {
            "options": vars(self),
            "tokens": tokens_digest(tokens),
            "compressor": to_section(work.compressor),
            "model": weights_digest(cast("PreTrainedModel", work.model)),
            "plans": tokens_digest(tensor for plan in work.plans.values() for tensor in plan.to_tensors().values()),
        }


def batch_order(batches: int, steps: int, seed: int) -> list[int]:
    """Number of the batch of each step; each is taken once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // batches)
    return [index for _ in range(rounds) for index in torch.randperm(batches, generator=generator).tolist()][:steps]


def _root_mean_square(tensor: Tensor) -> float:
    return max(float(tensor.detach().float().square().mean().sqrt()), 1e-8)


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error over the target's energy, fp32 scalar."""
    difference = (output.float() - target.float()).square().sum(-1)
    energy = target.float().square().sum(-1)
    return (difference / energy.clamp_min(ENERGY_FLOOR * energy.median())).mean()
