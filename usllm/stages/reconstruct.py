"""Reconstruct: block after block, compressed layers learn to give the dense block's output (`docs/method.md` §5).

Every block is fed the stream that the compressed blocks before it make, and is aimed at what the dense block makes of
the dense stream: what earlier blocks lost can be won back. All parameters of the block learn. The loss of a token is
relative to the energy of its target, held above a share of the median so that silent tokens do not decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.progress import Progress
from torch import Tensor, nn

from usllm.compress import compressed_layers, reproject_
from usllm.compress.gradients import spread_gradients_
from usllm.stages.base import Stage, Work
from usllm.stages.block_errors import increment_error, relative_error
from usllm.stages.block_plans import plan_for_stream_
from usllm.stages.block_state import BlockStates
from usllm.stages.blocks import capture, decoder_blocks, run_block
from usllm.system.errors import UserError
from usllm.system.modes import evaluating
from usllm.training.optimization import GroupConfig, OptimizerConfig, build_optimizer, share_of_peak

if TYPE_CHECKING:
    pass

STATISTICS = ("student", "dense")


class Reconstruct(Stage):
    """Trains the blocks one after another.

    Args:
        sequences: Of the training text; what does not fill a batch is left out.
        steps: Optimizer steps for each block.
        batch_size: Sequences of a step. Many small steps are better than few large ones.
        latent_lr: Learning rate of latents, relative to their root mean square at the start.
        scale_lr: Learning rate of the scales that a method trains.
        lr: Learning rate of everything else in the block.
        warmup_steps: Of a linear rise; a cosine follows it down to 0.
        ramp: Share of the steps over which the block goes from its latent weights to what its states decode to, where
            latents are weights; 0 computes with the states from the first step on.
        statistics: What a block's states are shared out by: ``student`` measures the stream that its compressed
            predecessors make, ``dense`` keeps the plans that were made from the dense model.
        calibration_sequences: Of the first ones, how many ``student`` measures.
        save_every_n_steps: A kill costs at most these steps; finished blocks are never done again.

    Raises:
        UserError: A value is out of range.
    """

    name: ClassVar[str] = "reconstruct"

    def __init__(
        self,
        sequences: int = 512,
        steps: int = 200,
        batch_size: int = 8,
        latent_lr: float = 0.1,
        scale_lr: float = 1e-3,
        lr: float = 2e-3,
        warmup_steps: int = 10,
        ramp: float = 0.3,
        statistics: str = "student",
        calibration_sequences: int = 128,
        save_every_n_steps: int = 50,
    ) -> None:
        counts = {"steps": steps, "batch_size": batch_size, "save_every_n_steps": save_every_n_steps}
        for key, value in (counts | {"calibration_sequences": calibration_sequences}).items():
            if value < 1:
                raise UserError(f"stages.reconstruct.{key}={value}: must be 1 or more")
        if sequences < batch_size:
            raise UserError(f"stages.reconstruct.sequences={sequences}: must be at least batch_size={batch_size}")
        for key, rate in {"latent_lr": latent_lr, "scale_lr": scale_lr, "lr": lr}.items():
            if not 0 < rate < float("inf"):
                raise UserError(f"stages.reconstruct.{key}={rate}: must be above 0, and finite")
        if not 0 <= warmup_steps <= steps:
            raise UserError(f"stages.reconstruct.warmup_steps={warmup_steps}: must be from 0 to steps={steps}")
        if not 0 <= ramp <= 1:
            raise UserError(f"stages.reconstruct.ramp={ramp}: is a share of the steps; must be from 0 to 1")
        if statistics not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise UserError(f"stages.reconstruct.statistics={statistics!r}: unknown; choose one of {known}")
        self.sequences, self.steps, self.batch_size = sequences, steps, batch_size
        self.latent_lr, self.scale_lr, self.lr, self.warmup_steps = latent_lr, scale_lr, lr, warmup_steps
        self.ramp, self.statistics, self.calibration_sequences = ramp, statistics, calibration_sequences
        self.save_every_n_steps = save_every_n_steps

    def run(self, work: Work) -> None:
        """Train all blocks, or those that a killed run has left.

        Raises:
            UserError: The text is shorter than a batch.
        """
        tokens = torch.cat([batch["input_ids"] for batch in work.batches(self.sequences)])
        tokens = tokens[: len(tokens) // self.batch_size * self.batch_size]
        if not len(tokens):
            raise UserError(f"stages.reconstruct.batch_size={self.batch_size}: the text has fewer sequences")
        teacher = work.load_dense().to(work.device).eval()
        states = BlockStates(work.store(self, tokens=tokens))
        with evaluating(work.model):  # the streams are those of a model that is measured, without dropout
            self._run_blocks(work, teacher, tokens, states)

    def _run_blocks(self, work: Work, teacher: nn.Module, tokens: Tensor, states: BlockStates) -> None:
        blocks, dense_blocks = decoder_blocks(work.model), decoder_blocks(teacher)
        names = {id(module): name for name, module in teacher.named_modules()}
        batches = tokens.split(self.batch_size)
        with work.context():
            student, inputs = capture(work.model, blocks, batches, work.device)
            dense, _ = capture(teacher, dense_blocks, batches, work.device)
        with Progress(disable=not work.shows_progress, transient=True) as bar:
            task = bar.add_task("Reconstructing", total=len(blocks) * self.steps)
            for number, (block, dense_block) in enumerate(zip(blocks, dense_blocks, strict=True)):
                arguments, of_block = inputs[number], f"Reconstructing block {number + 1} of {len(blocks)}"
                bar.update(task, description=of_block)
                targets = run_block(dense_block, dense, arguments, self.batch_size, work.context)
                if not states.load_finished(number, block, work.compressor):
                    if self.statistics == "student" and not states.load_plans(number, block, work.compressor):
                        some = student[: -(-self.calibration_sequences // self.batch_size) * self.batch_size]
                        prefix = names[id(dense_block)]
                        plan_for_stream_(work, block, dense_block, prefix, some, arguments, self.batch_size)
                    for step, loss in self._train(work, number, block, student, targets, arguments, states):
                        bar.update(task, advance=1, description=f"{of_block}, step {step + 1}, error {loss:.3f}")
                after = run_block(block, student, arguments, self.batch_size, work.context)
                found = {
                    "block": number,
                    "stream_error": float(relative_error(after, targets)),
                    "increment_error": increment_error(after - student, targets - dense),
                }
                work.found.setdefault(self.name, []).append(found)
                bar.update(task, completed=(number + 1) * self.steps)
                student, dense = after, targets

    def _train(
        self,
        work: Work,
        number: int,
        block: nn.Module,
        student: Tensor,
        targets: Tensor,
        arguments: dict[str, Any],
        states: BlockStates,
    ) -> Iterator[tuple[int, float]]:
        optimizer = build_optimizer(block, self._settings(), fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        first = states.load_unfinished(number, block, optimizer)
        if first:  # rates belong to the tensors that training began with
            peaks = [group["peak"] for group in optimizer.param_groups]
        order = sequence_order(len(student), self.steps * self.batch_size, work.seed + number).view(self.steps, -1)
        for step in range(first, self.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                share = (step + 1) / self.warmup_steps if step < self.warmup_steps else self._fallen(step)
                group["peak"], group["lr"] = peak, peak * share
            for layer in compressed_layers(block).values():
                layer.ramp = min(step / (self.ramp * self.steps), 1.0) if self.ramp else 1.0
            with work.context():
                output = block(student[order[step]], **arguments)
                output = output[0] if isinstance(output, tuple) else output
            loss = relative_error(output, targets[order[step]])
            loss.backward()
            spread_gradients_(block)
            torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            reproject_(block)
            if (step + 1) % self.save_every_n_steps == 0 and step + 1 < self.steps:
                states.save_unfinished(number, block, optimizer, step + 1)
            yield step, float(loss.detach())
        for layer in compressed_layers(block).values():
            layer.ramp = 1.0
        states.save_finished(number, block)

    def _settings(self) -> OptimizerConfig:
        return OptimizerConfig(
            lr=self.lr,
            weight_decay=0.0,
            latents=GroupConfig(relative_lr=self.latent_lr),
            scales=GroupConfig(lr=self.scale_lr),
        )

    def _fallen(self, step: int) -> float:
        return share_of_peak("cosine", self.warmup_steps, self.steps, step)


def sequence_order(sequences: int, count: int, seed: int) -> Tensor:
    """Numbers of the sequences that ``count`` places take, int64; each is taken once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // sequences)
    return torch.cat([torch.randperm(sequences, generator=generator) for _ in range(rounds)])[:count]
