"""Perplexity of a model that stays on disk: all windows through one block after another, by the usual protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from usllm.compress.values import compute_dtype
from usllm.config import EvaluationConfig
from usllm.data.batches import in_parts
from usllm.data.windows import resolved_rule, start_token
from usllm.eval.windows import measured_windows, result_of
from usllm.models.hollow import Surroundings
from usllm.models.loading import check_vocabulary
from usllm.runs.measure import row_of
from usllm.stages.block_arguments import Arguments
from usllm.stages.blocks import run_block
from usllm.stages.stored_blocks import StoredBlocks
from usllm.system.announce import announce
from usllm.system.errors import RunError
from usllm.system.machine import choose_autocast

_HEAD_ELEMENTS = 1 << 25
"""Weights of the head that are held at a time."""
_LOGITS = 1 << 23
"""Logits that are held at a time."""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class _Part:
    """Windows of one test set and length that are run in batches of one size.

    Attributes:
        ids: int64 [windows, window].
        batch_size: Windows of a forward pass.
        stream: Their hidden states [windows, window, hidden].
        arguments: What each block is called with besides.
    """

    ids: Tensor
    batch_size: int
    stream: Tensor
    arguments: list[Arguments]


def measure_blocks(
    source: StoredBlocks,
    block: Callable[[int], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, Tensor],
    config: EvaluationConfig,
    title: str,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Rows as :func:`usllm.runs.measure.measure` gives them, equal to rounding.

    Args:
        source: What stands around the blocks, and where streams live.
        block: Gives a block by its number, dense or compressed.
        tokenizer: Of the model.
        streams: Token ids [n] by test set.
        config: Windows and precision.
        title: What is being measured, for the progress bar.
        show_progress: Whether to draw it.

    Raises:
        UserError: A text does not fill a window, or holds tokens that the model does not have.
        RunError: A perplexity is NaN.
    """
    model_config = source.around.model.config
    rule = resolved_rule(config.window_start, model_config.model_type, tokenizer, "evaluation.window_start")
    first = start_token(rule, tokenizer)
    autocast = choose_autocast(config.precision, source.device)
    context: Context = nullcontext if autocast is None else (lambda: torch.autocast(source.device.type, autocast))
    began = time.perf_counter()
    parts: dict[tuple[str, int], list[_Part]] = {}
    for name, ids in streams.items():
        check_vocabulary(model_config, int(ids.max()), f"test set {name!r}")
        for window in config.windows:
            cut = measured_windows(ids, window, config.max_windows, name=name, first=first).long()
            parts[name, window] = list(_parts(source, cut, config.batch_size, context))
    with Progress(console=Console(stderr=True), transient=True, disable=not show_progress) as bar:
        announce(bar, f"{title}: measuring, block by block")
        for number in bar.track(range(source.count), description=f"{title}, block by block"):
            current = block(number)
            for part in (part for found in parts.values() for part in found):
                # In its place: a window's states are read once.
                run_block(current, part.stream, part.arguments[number], part.batch_size, context, part.stream)
    source.without_dense()
    rows = []
    for (name, window), found in parts.items():
        losses = torch.cat([_summed_losses(source.around, part, context) for part in found]).tolist()
        seconds = time.perf_counter() - began
        result = result_of(losses, window, streams[name].numel(), seconds, name=name, first=first)
        if math.isnan(result.perplexity):
            raise RunError(
                f"the perplexity on {name!r} with windows of {window} is NaN: take other settings, or "
                "evaluation.precision=fp32 where a sum was too large for less"
            )
        rows.append(row_of(result))
    return rows


def _parts(source: StoredBlocks, windows: Tensor, batch_size: int, context: Context) -> Iterator[_Part]:
    """Windows in batches of one size, and those that are left over, which other masks may belong to."""
    whole = len(windows) // batch_size * batch_size
    for ids, size in ((windows[:whole], batch_size), (windows[whole:], len(windows) - whole)):
        if len(ids):
            yield _Part(ids, size, *source.captured(in_parts({"input_ids": ids}, size), context, as_computed=False))


@torch.no_grad()
def _summed_losses(around: Surroundings, part: _Part, context: Context) -> Tensor:
    """Cross-entropy in nats of each window, fp64 [windows], over the tokens that its own tokens come before.

    Some rows of the head are applied to all places before the next ones are read: their share of the normaliser is
    added up, and a place's own logit is picked where its token is among them.
    """
    for begin in range(0, len(part.ids), part.batch_size):
        batch = slice(begin, begin + part.batch_size)
        with context():
            part.stream[batch] = around.before_head(part.ids[batch], part.stream[batch])
    hidden, targets = part.stream[:, :-1], part.ids[:, 1:]
    width, vocabulary = hidden.shape[-1], around.head.out_features
    normaliser = torch.full(targets.shape, -math.inf)
    own = torch.zeros(targets.shape)
    rows = max(1, _HEAD_ELEMENTS // width)
    for begin in range(0, vocabulary, rows):
        end = min(begin + rows, vocabulary)
        weight, bias = around.head_rows(slice(begin, end))
        with context():
            dtype = compute_dtype(weight)
        weight = weight.to(dtype)  # once, not for each product
        for window in range(len(targets)):
            for some in torch.arange(targets.shape[1]).split(max(1, _LOGITS // (end - begin))):
                place = slice(int(some[0]), int(some[-1]) + 1)
                with context():
                    logits = F.linear(hidden[window, place].to(around.device), weight, bias).float()
                found = logits.logsumexp(-1).cpu()
                normaliser[window, place] = torch.logaddexp(normaliser[window, place], found)
                wanted = targets[window, place] - begin
                inside = (wanted >= 0) & (wanted < end - begin)
                picked = logits.cpu().gather(1, wanted.clamp(0, end - begin - 1)[:, None])[:, 0]
                own[window, place] = torch.where(inside, picked, own[window, place])
    return (normaliser - own).double().sum(1)
