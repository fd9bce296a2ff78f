"""Reconstruct: block after block, compressed layers learn to give the dense block's output (`docs/method.md` §5).

Every block is fed the stream that the compressed blocks before it make, and is aimed at what the dense block makes of
the dense stream: what earlier blocks lost can be won back (``recovery`` says how much of it). All parameters of the
block learn. The loss of a token is relative to the energy of its target, held above a share of the median so that
silent tokens do not decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from usllm.compress import compressed_layers, reproject_
from usllm.compress.gradients import spread_gradients_, sum_gradients_
from usllm.data.batches import Batch, in_parts, model_inputs
from usllm.stages.base import Stage, Work
from usllm.stages.block_arguments import Arguments
from usllm.stages.block_errors import increment_error, relative_error, stream_error
from usllm.stages.block_plans import plan_for_stream_
from usllm.stages.block_progress import BlockProgress
from usllm.stages.block_source import BlockSource, LoadedBlocks
from usllm.stages.block_state import BlockStates
from usllm.stages.block_windows import BlockWindow, DenseStreams, block_windows
from usllm.stages.blocks import decoder_blocks, output_of, run_block
from usllm.system.errors import UserError
from usllm.system.modes import evaluating
from usllm.system.ranks import ranks, sum_over_ranks_
from usllm.training.optimization import GroupConfig, OptimizerConfig, build_optimizer, share_of_peak

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
        recovery: Share of what earlier blocks lost that a block is to win back: 1 aims it at the dense stream, 0 at
            what the dense block adds to its stream.
        statistics: What a block's states are shared out by: ``student`` measures the stream that its compressed
            predecessors make, ``dense`` keeps the plans that were made from the dense model.
        calibration_sequences: Of the first ones, how many ``student`` measures.
        window: Blocks that are trained together, aimed at the dense stream behind the last of them.
        stride: Blocks from one window to the next, at most ``window``; those that two windows share learn twice.
        blocks: Only the first ones, to try settings; the others stay as they started. ``None``: all.
        save_every_n_steps: A kill costs at most these steps; finished windows are never done again.

    Raises:
        UserError: A value is out of range.
    """

    name: ClassVar[str] = "reconstruct"
    later_options: ClassVar[Mapping[str, Any]] = {"recovery": 1.0}

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
        recovery: float = 1.0,
        statistics: str = "student",
        calibration_sequences: int = 128,
        window: int = 1,
        stride: int = 1,
        blocks: int | None = None,
        save_every_n_steps: int = 50,
    ) -> None:
        counts = {"steps": steps, "batch_size": batch_size, "save_every_n_steps": save_every_n_steps}
        counts |= {"calibration_sequences": calibration_sequences, "window": window, "stride": stride}
        for key, value in (counts | {"blocks": 1 if blocks is None else blocks}).items():
            if value < 1:
                raise UserError(f"stages.reconstruct.{key}={value}: must be 1 or more")
        if stride > window:
            raise UserError(
                f"stages.reconstruct.stride={stride}: leaves blocks out where window={window}; at most that"
            )
        if sequences < batch_size:
            raise UserError(f"stages.reconstruct.sequences={sequences}: must be at least batch_size={batch_size}")
        for key, rate in {"latent_lr": latent_lr, "scale_lr": scale_lr, "lr": lr}.items():
            if not 0 < rate < float("inf"):
                raise UserError(f"stages.reconstruct.{key}={rate}: must be above 0, and finite")
        if not 0 <= warmup_steps <= steps:
            raise UserError(f"stages.reconstruct.warmup_steps={warmup_steps}: must be from 0 to steps={steps}")
        for key, (share, whole) in {"ramp": (ramp, "the steps"), "recovery": (recovery, "what was lost")}.items():
            if not 0 <= share <= 1:
                raise UserError(f"stages.reconstruct.{key}={share}: is a share of {whole}; must be from 0 to 1")
        if statistics not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise UserError(f"stages.reconstruct.statistics={statistics!r}: unknown; choose one of {known}")
        self.sequences, self.steps, self.batch_size = sequences, steps, batch_size
        self.latent_lr, self.scale_lr, self.lr, self.warmup_steps = latent_lr, scale_lr, lr, warmup_steps
        self.ramp, self.recovery = ramp, recovery
        self.statistics, self.calibration_sequences = statistics, calibration_sequences
        self.window, self.stride, self.blocks = window, stride, blocks
        self.save_every_n_steps = save_every_n_steps

    def run(self, work: Work) -> None:
        """Train all blocks, or those that a killed run has left.

        Raises:
            UserError: The text is shorter than a batch, or there are fewer blocks than asked for.
        """
        text = self.text(work)
        count = len(decoder_blocks(work.model))
        for key, value in {"blocks": self.blocks or 1, "window": self.window}.items():
            if value > count:
                raise UserError(f"stages.reconstruct.{key}={value}: the model has {count} blocks; give at most that")
        self.refuse_devices(ranks().world_size if work.together else 1)
        source = work.blocks or LoadedBlocks(work)
        with evaluating(work.model):  # the streams are those of a model that is measured, without dropout
            self._run_blocks(work, source, text, self.states(work, text))

    def refuse_devices(self, devices: int) -> None:
        if self.batch_size < devices:
            raise UserError(
                f"stages.reconstruct.batch_size={self.batch_size}: {devices} devices share the sequences of a "
                "step; give at least as many"
            )

    def text(self, work: Work) -> Batch:
        """What blocks learn from: ``input_ids`` int64 [sequences, context], and ``position_ids`` where it has them.

        Raises:
            UserError: It is shorter than a batch.
        """
        batches = [model_inputs(batch) for batch in work.batches(self.sequences)]
        count = len(batches) // self.batch_size * self.batch_size
        if not count:
            raise UserError(f"stages.reconstruct.batch_size={self.batch_size}: the text has fewer sequences")
        return {key: torch.cat([batch[key] for batch in batches[:count]]) for key in batches[0]}

    def states(self, work: Work, text: Batch) -> BlockStates:
        """What this stage keeps, and has kept, for the work as it is now."""
        positions = {key: value for key, value in text.items() if key != "input_ids"}
        return BlockStates(work.store(self, tokens=text["input_ids"], **positions))

    def windows(self, count: int) -> list[BlockWindow]:
        """Which blocks are trained together, in their order, of a model of ``count`` blocks."""
        return block_windows(self.blocks or count, self.window, self.stride)

    def _run_blocks(self, work: Work, source: BlockSource, text: Batch, states: BlockStates) -> None:
        size = self.batch_size
        student, stream, inputs = source.enter(in_parts(text, size))
        dense = DenseStreams(stream, source.dense, inputs, size, work.context, source.room)
        del stream  # held as long as it is needed
        windows = self.windows(source.count)
        with BlockProgress(len(windows), self.steps, work.shows_progress) as progress:
            for window in windows:
                together = source.window(window)
                found = states.load_finished(window.number, together, work.compressor)
                targets, trained_before = dense.before(window.blocks.stop), found is not None
                if found is None:
                    if self.statistics == "student" and not states.load_plans(window.number, together, work.compressor):
                        self._plan_(work, window, together, source, student, inputs)
                    source.without_dense()
                    before = dense.before(window.blocks.start)
                    aims = self._aims(student, before, targets)
                    found = self._train(work, window, together, student, aims, inputs, states, progress, source)
                    del aims, before  # streams that would live as long as the next window
                source.without_dense()
                for number in window.leaving:
                    block, room = together[number - window.blocks.start], source.room
                    after = None if room is None else room(student.shape, student.dtype)
                    after = run_block(block, student, inputs[number], size, work.context, after)
                    before, target = dense.before(number), dense.before(number + 1)
                    row = {
                        "block": number,
                        "stream_error": stream_error(after, target),
                        "increment_error": increment_error((student, after), (before, target)),
                        **found,
                    }
                    work.tell(self, row)
                    progress.finished(row, trained_before)
                    student = after
                    dense.forget_before(number + 1)
                progress.window_done(window.number)

    def _plan_(
        self,
        work: Work,
        window: BlockWindow,
        together: nn.ModuleList,
        source: BlockSource,
        student: Tensor,
        inputs: Sequence[Arguments],
    ) -> None:
        """Share bits out anew in new blocks; those before them are taken as dense: they are not trained yet."""
        size = self.batch_size
        some = student[: -(-self.calibration_sequences // size) * size]
        for number, block in zip(window.blocks, together, strict=True):
            if number in window.new:
                dense, prefix = source.dense(number), source.name(number)
                plan_for_stream_(work, block, dense, prefix, some, inputs[number], size)
            if number + 1 in window.new:
                after = None if source.room is None else source.room(some.shape, some.dtype)
                some = run_block(source.dense(number), some, inputs[number], size, work.context, after)

    def _train(
        self,
        work: Work,
        window: BlockWindow,
        together: nn.ModuleList,
        student: Tensor,
        aims: Callable[[Tensor], Tensor],
        inputs: Sequence[Arguments],
        states: BlockStates,
        progress: BlockProgress,
        source: BlockSource,
    ) -> dict[str, float]:
        began = time.perf_counter()
        optimizer = build_optimizer(together, self._settings(), fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        first, spent = states.load_unfinished(window.number, together, optimizer)
        if first:  # rates belong to the tensors that training began with
            peaks = [group["peak"] for group in optimizer.param_groups]
        compressed = compressed_layers(together).values()
        ramping = [layer for i in window.new for layer in compressed_layers(together[i - window.blocks.start]).values()]
        seed = work.seed + window.number
        order = sequence_order(len(student), self.steps * self.batch_size, seed).view(self.steps, -1)
        error, mine = 0.0, work.part_of(self.batch_size)
        for step in range(first, self.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                share = (step + 1) / self.warmup_steps if step < self.warmup_steps else self._fallen(step)
                group["peak"], group["lr"] = peak, peak * share
            for layer in ramping:
                layer.ramp = min(step / (self.ramp * self.steps), 1.0) if self.ramp else 1.0
            stream, target = student[order[step][mine]].to(work.device), aims(order[step]).to(work.device)
            with work.context():
                for number, block in zip(window.blocks, together, strict=True):
                    stream = output_of(block, stream, inputs[number](order[step][mine]))
            loss = relative_error(stream, target, mine)
            loss.backward()
            if work.together:
                sum_gradients_(together)
            spread_gradients_(together)
            torch.nn.utils.clip_grad_norm_(together.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            reproject_(together)
            error = float(sum_over_ranks_(loss.detach()) if work.together else loss.detach())
            if (step + 1) % self.save_every_n_steps == 0 and step + 1 < self.steps:
                seconds = spent + time.perf_counter() - began
                with work.writing():
                    states.save_unfinished(window.number, together, optimizer, step + 1, seconds)
            progress.stepped(window, step, error)
        for layer in compressed:
            layer.ramp = 1.0
        found = {"last_loss": error, "seconds": spent + time.perf_counter() - began}
        with work.writing():
            states.save_finished(window.number, together, found, source.kept(window, together))
        return found

    def _aims(self, student: Tensor, dense: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """What the sequences of given numbers are to become, made when asked for: streams may be larger than memory."""
        if self.recovery == 1:
            return lambda some: targets[some]
        return lambda some: targets[some] + (1 - self.recovery) * (student[some] - dense[some])

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
