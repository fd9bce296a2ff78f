"""Attention of packed models that generate on the CPU: one token at a time, whose scores are computed in float32.

PyTorch's product for bfloat16 takes 520 µs for one token that looks back on 512 (9 heads of 64), and 150 for two; for
float32 it takes 69 (docs/log.md). It computes in float32 inside, so nothing is lost by handing that in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "usllm_sdpa"
"""Under which transformers knows :func:`attention`."""
_STANDARD = "sdpa"
_WIDENED = (torch.bfloat16, torch.float16)


def widen_attention_(model: PreTrainedModel) -> None:
    """Have a model attend by :func:`attention` on the CPU in a narrow type, where it would by ``sdpa``."""
    here = next(model.parameters()).device.type == "cpu" and model.dtype in _WIDENED
    if here and model.config._attn_implementation == _STANDARD:
        register_attention()
        model.set_attn_implementation(NAME)


def register_attention() -> None:
    """Make the name known to transformers: of a model that is loaded, or that was unpickled in another process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_STANDARD])


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' ``sdpa``, in float32 for a single query in a narrower type on the CPU.

    Args:
        module: The attention layer.
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width].
        value: As ``key``.
        attention_mask: Of booleans, or added to the scores.
        options: As ``sdpa`` takes them.

    Returns:
        [batch, queries, heads, width] in the type of ``query``, and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = query.dtype
    # Paged caches and learnt biases are for ``sdpa`` itself to work on.
    plain = options.get("cache") is None and options.get("position_bias") is None
    if plain and query.shape[2] == 1 and query.device.type == "cpu" and given in _WIDENED:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    y, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return y.to(given), weights
