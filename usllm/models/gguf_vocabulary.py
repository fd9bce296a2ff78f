"""A tokenizer as the metadata of a GGUF file: the inverse of :mod:`usllm.models.gguf_tokenizer`.

llama.cpp has its own tokenizers, told apart by two words (``model`` and ``pre``). What a tokenizer of transformers does
beyond them would be lost without a word, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from usllm.models.gguf_pre_tokenizers import PRE_TOKENIZERS, WRITTEN, pre_tokenizer
from usllm.system.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of ``tokenizer.ggml.token_type``."""

_SPACE = "\u2581"


def vocabulary_metadata(
    tokenizer: PreTrainedTokenizerBase, rows: int, generation: GenerationConfig | None = None
) -> dict[str, Any]:
    """Metadata that describe a tokenizer, each key with ``tokenizer.`` before it.

    Args:
        tokenizer: of the model.
        rows: of the embedding; tokens that the tokenizer lacks are named ``[PAD…]``.
        generation: names more tokens that end a text.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"a {type(tokenizer).__name__} without a tokenizer.json")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _refusal(f"a model of type {model['type']}, and not byte pairs")
    # transformers 4 reads byte-level files of a Llama with a fallback to bytes, which never happens: all are tokens.
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(content["pre_tokenizer"]))
    model["byte_fallback"] = bool(model.get("byte_fallback")) and not byte_level
    tokens, types = _tokens(content, tokenizer, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise _refusal("no merges, without which llama.cpp loads no vocabulary")
    found: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    if model["byte_fallback"]:
        found |= _sentencepiece(content, tokenizer, tokens, merges)
    else:
        found |= {"ggml.model": "gpt2", "ggml.pre": _split(content), "ggml.merges": merges}
    found |= _special(tokenizer, generation)
    for which, adds in _framing(tokenizer).items():
        found[f"ggml.add_{which}_token"] = adds
    if isinstance(tokenizer.chat_template, str):
        found["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{key}": value for key, value in found.items()}


def _tokens(content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by number."""
    vocabulary = dict(content["model"]["vocab"])
    added = {token["content"]: token for token in content["added_tokens"]}
    vocabulary |= {name: token["id"] for name, token in added.items()}
    if (largest := max(vocabulary.values())) >= rows:
        raise _refusal(f"a token of number {largest}, for which the model, which has {rows}, has no embedding")
    names = {number: name for name, number in vocabulary.items()}
    bytes_too = content["model"]["byte_fallback"]
    types = []
    for number in range(rows):
        name = names.setdefault(number, f"[PAD{number}]")
        if name not in vocabulary:
            types.append(UNUSED)
        elif bytes_too and name == tokenizer.unk_token:
            types.append(UNKNOWN)
        elif name in added:
            types.append(CONTROL if added[name]["special"] else USER_DEFINED)
        elif bytes_too and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return [names[number] for number in range(rows)], types


def _split(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level vocabulary cuts texts."""
    # llama.cpp does not normalise; texts are in NFC nearly always, and its own converter passes over that too.
    normalizer = content["normalizer"] or {"normalizers": []}
    if other := {step["type"] for step in normalizer.get("normalizers", [normalizer])} - {"NFC"}:
        raise _refusal(f"the normalizer {', '.join(sorted(other))}")
    given = _steps(content["pre_tokenizer"])
    for name in WRITTEN:
        known = PRE_TOKENIZERS[name]
        if given == _steps(json.loads(pre_tokenizer(name).__getstate__())) and (
            bool(content["model"].get("ignore_merges")) == known.whole_words_first
        ):
            return name
    raise _refusal(f"a way to split texts that is none of {', '.join(WRITTEN)}")


def _steps(pre: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Steps of a pre-tokenizer, as the library ``tokenizers`` writes them."""
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for each in pre["pretokenizers"] for step in _steps(each)]
    # Where a token lies in its text, which is no matter of which one it is.
    return [{key: value for key, value in pre.items() if key != "trim_offsets"}]


def _sentencepiece(
    content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], merges: Sequence[str]
) -> dict[str, Any]:
    """Scores from which llama.cpp makes the same merges: the sooner one is made, the higher its result."""
    normalizer = content["normalizer"] or {}
    replaces = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in replaces]
    pre = (content["pre_tokenizer"] or {"type": None})["type"]
    if kinds not in (["Replace"], ["Prepend", "Replace"], []) or pre not in (None, "Split", "Metaspace"):
        raise _refusal(f"normalizers {', '.join(kinds) or 'none'} before a split of type {pre}")
    ranks: dict[str, int] = {}
    for merge in merges:
        left, _, right = merge.partition(" ")
        product = left + right
        if product in ranks and ranks[product] != len(ranks) - 1:
            raise _refusal(f"merges that make {product!r} at several places of their order")
        ranks.setdefault(product, len(ranks))
    scores = [-float(ranks.get(token, len(ranks)) + 1) for token in tokens]
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": first.startswith(_SPACE),
    }


def _special(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> dict[str, Any]:
    """Numbers of the special tokens, and of up to two more that end a text."""
    found = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            found[f"ggml.{key}_token_id"] = number
    ends = getattr(generation, "eos_token_id", None)
    more = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, tokenizer.eos_token_id)]
    return found | {f"ggml.{key}_token_id": end for key, end in zip(("eot", "eom"), more, strict=False)}


def _framing(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a beginning- and an end-of-text token are put around a text."""
    text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    framed: list[int] = tokenizer("a").input_ids
    for begins in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_token_id] if begins else []
            after = [tokenizer.eos_token_id] if ends else []
            if framed == [*before, *text, *after]:
                return {"bos": begins, "eos": ends}
    raise _refusal("other tokens around a text than those of its beginning and end")


def _refusal(what: str) -> UserError:
    return UserError(f"form=gguf: the tokenizer has {what}: llama.cpp has no such tokenizer; pass form=dense")
