"""The windows that a perplexity is measured on, and the result that their losses make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usllm.data.windows import EACH, NONE, cut_windows
from usllm.system.errors import UserError


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean cross-entropy in nats; ``nan`` or ``inf`` are reported as they come.
        window: tokens per window; ``window - 1`` of them are predicted.
        windows: number of windows measured.
        tokens: tokens in the whole text, measured or not.
        seconds: wall-clock time.
        name: of the test set.
        tokenizer: class and size of the vocabulary, or where the tokenizer came from.
        bos: where a beginning-of-text token stands, in words.
        window_start: ``none``, or ``each`` where every window begins with that token.
        window_losses: mean cross-entropy of each window, in nats.
    """

    perplexity: float
    window: int
    windows: int
    tokens: int
    seconds: float
    name: str = "text"
    tokenizer: str = "unknown"
    bos: str = "unknown"
    window_start: str = NONE
    window_losses: tuple[float, ...] = ()


def measured_windows(
    token_ids: Tensor, window: int, max_windows: int | None, *, name: str = "text", first: int | None = None
) -> Tensor:
    """The windows that a perplexity is measured on, integers ``[windows, window]``.

    Args:
        token_ids: integer ``[n]``, the whole text.
        window: tokens per window, at least 2.
        max_windows: the first ones only.
        name: of the test set.
        first: token at the start of each window; ``None``: text alone.

    Raises:
        UserError: the text does not fill one window.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise UserError(
            f"evaluation.windows={window} must be at least 2, and evaluation.max_windows={max_windows} at least 1"
        )
    check_long_enough(token_ids, window, name)
    cut, _ = cut_windows(token_ids.cpu().numpy(), window, first)
    return torch.from_numpy(cut[:max_windows])


def result_of(
    summed: Sequence[float], window: int, tokens: int, seconds: float, *, name: str = "text", first: int | None = None
) -> PerplexityResult:
    """The result of a measurement.

    Args:
        summed: cross-entropy of each window, in nats, summed over the tokens that are predicted.
        window: tokens per window.
        tokens: in the whole text.
        seconds: that it took.
        name: of the test set.
        first: token at the start of each window.
    """
    by_window = [loss / (window - 1) for loss in summed]
    mean = math.fsum(by_window) / len(by_window)
    return PerplexityResult(
        perplexity=math.exp(mean) if not mean > 700 else math.inf,
        window=window,
        windows=len(by_window),
        tokens=tokens,
        seconds=seconds,
        name=name,
        window_start=NONE if first is None else EACH,
        window_losses=tuple(by_window),
    )


def check_long_enough(token_ids: Tensor, window: int, name: str) -> None:
    """Raise a UserError when a test set does not fill one window."""
    if token_ids.numel() < window:
        raise UserError(
            f"Test set {name!r} holds {token_ids.numel()} tokens, fewer than one window of {window}; "
            "give more text or a smaller evaluation.windows"
        )
