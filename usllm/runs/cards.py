"""What the model card of a packed folder says about how it was made and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from usllm.compress import Compressor
from usllm.eval.perplexity import bos_rule, tokenizer_name
from usllm.packed.card import CardFacts
from usllm.system.files import expanded
from usllm.system.machine import machine, machine_line


def card_facts(
    out: str | Path,
    base: str,
    commands: Sequence[str],
    compressor: Compressor,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rule: str,
    options: Mapping[str, Any] | None = None,
) -> CardFacts:
    """Facts of a card; ``measured_as`` ends with the protocol, and what the last column is may be added.

    Args:
        out: The folder, whose name is the model's.
        base: The dense model.
        commands: What made it, first to last.
        compressor: Method and configuration.
        rows: Perplexities, one row per test set and window.
        tokenizer: Of the model.
        rule: What stands at the start of each window, ``none`` or ``each``.
        options: How the compressed layers came about; ``None``: those of ``compressor``.
    """
    info = machine()
    options = dataclasses.asdict(compressor.options) if options is None else options
    return CardFacts(
        title=expanded(out).absolute().name,
        base=base,
        commands=commands,
        machine=machine_line(info),
        versions={str(name): str(number) for name, number in dict(info["versions"]).items()},  # type: ignore[call-overload]
        sketch=", ".join(f"{key}={value}" for key, value in options.items()),
        rows=rows,
        measured_as=(
            "Non-overlapping windows, each token predicted from those before it in its window; tokenizer "
            f"{tokenizer_name(tokenizer)}, beginning-of-text token: {bos_rule(tokenizer, rule)}. "
        ),
    )
