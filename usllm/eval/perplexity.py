"""Perplexity, as compression papers measure it.

The text as it is, tokenised once (so one BOS at its very start, and only if this tokenizer adds it), cut into
non-overlapping windows, the remainder dropped; cross-entropy of each token given those before it in its window, from
fp32 logits; the exponential of the mean. A family that needs it gets its BOS at the start of each window
(:mod:`usllm.data.windows`). The figure depends on window, window start, tokenizer and text, so results carry them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usllm.data.windows import AUTO, EACH, resolved_rule, start_token
from usllm.eval.windows import PerplexityResult, check_long_enough, measured_windows, result_of
from usllm.models.loading import check_vocabulary
from usllm.system.errors import RunError, UserError
from usllm.system.finite import first_nonfinite_output, first_nonfinite_tensor
from usllm.system.modes import evaluating
from usllm.system.ranks import dealt, ranks, sum_over_ranks_

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from usllm.data import SourceSpec

Progress = Callable[[str, int, int], None]
"""Called with (what, windows done, windows in all)."""

_POSITIONS_PER_CHUNK = 1024  # bounds the fp32 copy of the logits: 128k tokens of vocabulary x 1024 x 4 B = 0.5 GB


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    window: int,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
    *,
    autocast: torch.dtype | None = None,
    name: str = "text",
    device: torch.device | None = None,
    first: int | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on one token stream.

    Training mode of every module and the global RNG are as before afterwards. The ranks of a distributed run share the
    windows out among them and all return the figure of one process, to the last bit where their forward passes agree.

    Args:
        model: returns an object with ``logits`` ``[batch, window, vocabulary]``; used in its own dtype, on its device.
        token_ids: integer ``[n]``, the whole text.
        window: tokens per window, at least 2.
        max_windows: measure only the first ones.
        batch_size: windows per forward pass.
        progress: told after every forward pass.
        autocast: dtype of ``torch.autocast``; None leaves the caller's setting.
        name: of the test set.
        device: where it computes; None: where its first parameter is, which offloaded shards do not tell.
        first: token at the start of each window, which then holds ``window - 1`` tokens of the text; None: text alone.

    Raises:
        UserError: the text does not fill one window.
    """
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size={batch_size} must be at least 1")
    cut = measured_windows(token_ids, window, max_windows, name=name, first=first)
    if hasattr(config := getattr(model, "config", None), "get_text_config"):
        check_vocabulary(cast("PretrainedConfig", config), int(token_ids.max()), f"test set {name!r}")
    windows = len(cut)
    device = device or next(model.parameters()).device
    batches = cut.split(batch_size)
    losses = torch.zeros(windows, dtype=torch.float64, device=device)
    started = time.perf_counter()
    with evaluating(model), torch.no_grad(), _autocast(device, autocast):
        for number, batch, counts in dealt(batches):
            ids = batch.to(device=device, dtype=torch.long)
            summed = _summed_losses(model(input_ids=ids, use_cache=False).logits, ids)
            if counts:
                losses[number * batch_size :][: len(ids)] = summed
            if progress is not None:
                done = min((number // ranks().world_size + 1) * ranks().world_size * batch_size, windows)
                progress(name, done, windows)
    seconds = time.perf_counter() - started
    return result_of(sum_over_ranks_(losses).tolist(), window, token_ids.numel(), seconds, name=name, first=first)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test_sets: Mapping[str, Tensor],
    windows: Sequence[int],
    *,
    max_windows: int | None = None,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    device: torch.device | None = None,
    window_start: str = AUTO,
) -> list[PerplexityResult]:
    """Perplexity on every test set with every window, in the order given.

    Args:
        model: causal language model.
        tokenizer: that made the tokens; only described in the results.
        test_sets: name to token stream ``[n]``; see :func:`tokenise_test_sets`.
        windows: tokens per window.
        max_windows: per test set and window.
        batch_size: windows per forward pass.
        autocast: dtype of ``torch.autocast``; None leaves the caller's setting.
        progress: told after every forward pass.
        device: as for :func:`perplexity`.
        window_start: ``none``, ``each``, or ``auto``: what the model's family needs (:mod:`usllm.data.windows`).

    Raises:
        UserError: a window is longer than the model's context or than a test set; before anything is computed.
        RunError: a perplexity is NaN; names the first weight or module that is not finite.
    """
    from usllm.models.loading import check_context_length

    for window in windows:
        check_context_length(model.config, window, "evaluation.windows")
        for name, token_ids in test_sets.items():
            check_long_enough(token_ids, window, name)
    rule = resolved_rule(window_start, model.config.model_type, tokenizer, "evaluation.window_start")
    first = start_token(rule, tokenizer)
    tokenizer_described, bos = tokenizer_name(tokenizer), bos_rule(tokenizer, rule)
    results = []
    for name, ids in test_sets.items():
        for window in windows:
            result = perplexity(
                model,
                ids,
                window,
                max_windows,
                batch_size,
                progress,
                autocast=autocast,
                name=name,
                device=device,
                first=first,
            )
            if math.isnan(result.perplexity):
                raise RunError(_not_finite(model, ids[:window], result, autocast, device))
            results.append(replace(result, tokenizer=tokenizer_described, bos=bos))
    return results


def _not_finite(
    model: PreTrainedModel,
    ids: Tensor,
    result: PerplexityResult,
    autocast: torch.dtype | None,
    device: torch.device | None,
) -> str:
    """Message about a perplexity that is NaN, with its first cause in the window ``ids`` ``[window]``."""
    where = first_nonfinite_tensor(model)
    if where is None:
        device = device or next(model.parameters()).device
        with first_nonfinite_output(model) as found, evaluating(model), torch.no_grad(), _autocast(device, autocast):
            model(input_ids=ids[None].to(device), use_cache=False)
        where = found[0] if found else "a window after the first"
    return (
        f"the perplexity on {result.name!r} with windows of {result.window} is NaN, first seen in {where}: take an "
        "earlier checkpoint, or evaluation.precision=fp32 where a sum was too large for less"
    )


def tokenise_test_sets(
    sources: Mapping[str, SourceSpec], tokenizer: PreTrainedTokenizerBase, windows: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Read and tokenise every test set once: int64 ``[n]`` each.

    Args:
        sources: name to source.
        tokenizer: of the model.
        windows: the windows to come, so that a text too short for one fails here, before a model is loaded.

    Raises:
        UserError: a file is missing, unreadable, empty or too short.
    """
    from usllm.data.sources import read_text

    streams = {}
    for name, source in sources.items():
        ids = tokenizer(read_text(source, f"evaluation.test_sets.{name}"), verbose=False).input_ids
        streams[name] = torch.tensor(ids, dtype=torch.long)
        for window in windows:
            check_long_enough(streams[name], window, name)
    return streams


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the tokenizer came from, if known, and its number of tokens."""
    return f"{tokenizer.name_or_path or type(tokenizer).__name__} ({len(tokenizer)} tokens)"


def bos_rule(tokenizer: PreTrainedTokenizerBase, window_start: str) -> str:
    """Where a beginning-of-text token stands in what is measured, in words.

    Args:
        window_start: ``none`` or ``each``.
    """
    if window_start == EACH:
        return f"one {tokenizer.bos_token} at the start of each window"
    ids = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        return f"one {tokenizer.bos_token} at the start of the text"
    return "none added"


def _summed_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross-entropy in nats, fp64 [batch], of ``logits`` [batch, window, vocabulary] predicting the next id."""
    losses = []
    for predicted, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        chunks = zip(predicted.split(_POSITIONS_PER_CHUNK), targets.split(_POSITIONS_PER_CHUNK), strict=True)
        parts = [F.cross_entropy(part.float(), target, reduction="sum").double() for part, target in chunks]
        losses.append(torch.stack(parts).sum())
    return torch.stack(losses)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
