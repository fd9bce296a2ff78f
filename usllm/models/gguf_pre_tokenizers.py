r"""How byte-level vocabularies of GGUF files split text before merging, by their ``tokenizer.ggml.pre``.

A GGUF file names the split of the model's original tokenizer only. The patterns are those of the originals'
``tokenizer.json``; the names are llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split text.

    Attributes:
        pattern: of the pieces; ``None`` is GPT-2's.
        single_digits: cut every digit off first.
        whole_words_first: take a piece that is a token as it is, before any merge.
        begins_texts: a beginning-of-text token is added where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words_first: bool = False
    begins_texts: bool = False


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA3 = PreTokenizer(_WORDS + r"|\p{N}{1,3}" + _REST, whole_words_first=True, begins_texts=True)
_QWEN2 = PreTokenizer(_WORDS + r"|\p{N}" + _REST)

PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""The splits that are read."""
WRITTEN = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""Names that are written, one for each split; llama.cpp splits in another way where a file says ``default``."""


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer of the library ``tokenizers``.

    Args:
        name: a key of :data:`PRE_TOKENIZERS`.
    """
    from tokenizers import Regex, pre_tokenizers

    split = PRE_TOKENIZERS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
