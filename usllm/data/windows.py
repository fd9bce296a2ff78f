"""What stands at the start of each window of text, the same in training, calibration and measurement.

A sequence that is trained or calibrated on and a window that perplexity is measured on are cut by one function, under
one of two rules:

- ``none``: the text's tokens and nothing else. Only a text, or a document, whose tokenizer puts a beginning-of-text
  token before it begins with one: the protocol of published Llama perplexities.
- ``each``: the beginning-of-text token, then text: a window of L tokens holds L - 1 tokens of text. Where the text's
  next token is that token anyway, it is not doubled. Gemma needs it: without one, its first attention sink is missing
  and the perplexity of a window is many times higher.

``auto`` is the rule of the model's family (:data:`FAMILIES`). Perplexities under different rules do not compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from usllm.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NONE, EACH = "auto", "none", "each"
WINDOW_STARTS = (AUTO, NONE, EACH)
FAMILIES: Mapping[str, str] = {"gemma": EACH}
"""Rules of families by a word of ``model_type`` (``gemma2``, ``gemma3_text``, ``recurrent_gemma``); all others:
``none``, as their perplexities are published."""


def family_rule(model_type: str) -> str:
    """The rule of a model's family, ``none`` or ``each``.

    Args:
        model_type: as in the model's configuration.
    """
    return next((rule for family, rule in FAMILIES.items() if family in model_type.lower()), NONE)


def resolved_rule(asked: str, model_type: str, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    """``none`` or ``each``: what was asked for, or for ``auto`` the rule of the model's family.

    Args:
        asked: one of :data:`WINDOW_STARTS`.
        model_type: as in the model's configuration.
        tokenizer: of the model; one without a beginning-of-text token gets ``none`` from ``auto``.
        key: what the rule is called in the configuration, for messages.

    Raises:
        UserError: the rule is unknown, or needs a token that the tokenizer does not have.
    """
    if asked not in WINDOW_STARTS:
        raise UserError(f"{key}={asked}: unknown; choose one of {', '.join(WINDOW_STARTS)}")
    has_token = tokenizer.bos_token_id is not None
    if asked == AUTO:
        return family_rule(model_type) if has_token else NONE
    if asked == EACH and not has_token:
        raise UserError(
            f"{key}={asked}: the tokenizer has no beginning-of-text token (bos_token); set one in it, or use none"
        )
    return asked


def start_token(rule: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token at the start of each window under a resolved rule; ``None``: no token is put there."""
    return None if rule == NONE else int(tokenizer.bos_token_id)


def cut_windows(stream: NDArray[np.integer], length: int, first: int | None) -> tuple[NDArray[np.integer], int]:
    """Cut a token stream into windows of one length, one after the other.

    Args:
        stream: token ids ``[n]``.
        length: tokens per window, at least 2 where ``first`` is given.
        first: token at the start of each window (:func:`start_token`).

    Returns:
        The windows ``[windows, length]``, and how many tokens of the stream they used; the rest fills no window.
    """
    if first is None:
        count = len(stream) // length
        return stream[: count * length].reshape(count, length), count * length
    text = length - 1
    windows = np.full((len(stream) // text, length), first, dtype=stream.dtype)
    used = count = 0
    while True:
        begin = used + int(used < len(stream) and stream[used] == first)
        if begin + text > len(stream):
            return windows[:count], used
        windows[count, 1:] = stream[begin : begin + text]
        count, used = count + 1, begin + text
