"""The tokenizer of a GGUF file: what the file says about it holds under every version of transformers.

transformers builds the vocabulary and the merges. What differs between its versions is set here from the file: where
text is split, the beginning- and end-of-text tokens, the special tokens. Afterwards tokens of the file are encoded: a
vocabulary whose merges were misread falls apart.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from usllm.models.gguf_contents import GgufContents
from usllm.models.gguf_pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from usllm.models.gguf_vocabulary import CONTROL, NORMAL

_USED = (
    "model",
    "pre",
    "tokens",
    "scores",
    "token_type",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "padding_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
_FOR_OTHER_TASKS = (
    *(f"{name}_token_id" for name in ("seperator", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
)
"""Tokens of infilling and classification; text is never encoded with them."""

_MUST_BE_OFF = ("add_sep_token", "remove_extra_whitespaces", "escape_whitespaces")

TOKENIZER_KEYS = frozenset(
    f"tokenizer.{name}"
    for name in (
        *(f"ggml.{key}" for key in (*_USED, *_FOR_OTHER_TASKS, *_MUST_BE_OFF)),
        "chat_template",
        "huggingface.json",  # the original in full: the same again
    )
)
"""Metadata keys that are accounted for here."""

_SAMPLE = 2000
_LEAST_WHOLE = 0.9
"""Share of sampled tokens whose text must be encoded as that token; a vocabulary has a few that merges never reach."""


def check_tokenizer(contents: GgufContents) -> None:
    """Refuse what no tokenizer of transformers does; before anything is decoded.

    Raises:
        UserError: names the key and its value.
    """
    model = _get(contents, "model")
    if model not in ("gpt2", "llama"):
        raise contents.refusal(f"tokenizer.ggml.model={model!r} is not supported; those read are gpt2 and llama")
    if model == "gpt2" and _get(contents, "pre", "default") not in PRE_TOKENIZERS:
        raise contents.refusal(
            f"tokenizer.ggml.pre={_get(contents, 'pre')!r} is not supported; those read are {', '.join(PRE_TOKENIZERS)}"
        )
    for key in _MUST_BE_OFF:
        if _get(contents, key, False) and (key, model) != ("escape_whitespaces", "llama"):
            raise contents.refusal(f"tokenizer.ggml.{key}=True is not supported")
    tokens = _get(contents, "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise contents.refusal("it has no tokenizer.ggml.tokens")
    for key in _USED:
        index = _get(contents, key)
        if key.endswith("_token_id") and index is not None and not 0 <= index < len(tokens):
            raise contents.refusal(f"tokenizer.ggml.{key}={index} is none of its {len(tokens)} tokens")
    for key in ("bos", "eos"):
        if _get(contents, f"add_{key}_token") and _get(contents, f"{key}_token_id") is None:
            raise contents.refusal(f"tokenizer.ggml.add_{key}_token is set, but there is no {key}_token_id")
    if len(_get(contents, "token_type", tokens)) != len(tokens):
        raise contents.refusal("tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")


def tokenizer_of(contents: GgufContents) -> PreTrainedTokenizerBase:
    """The tokenizer, as the file describes it.

    Raises:
        UserError: the installed transformers reads it wrongly.
        Exception: whatever transformers raises for an odd vocabulary.
    """
    read = AutoTokenizer.from_pretrained(str(contents.path.parent), gguf_file=contents.path.name)
    backend = read.backend_tokenizer
    if _get(contents, "model") == "gpt2":
        pre = _get(contents, "pre", "default")
        backend.pre_tokenizer = pre_tokenizer(pre)
        backend.model.ignore_merges = PRE_TOKENIZERS[pre].whole_words_first
    tokens = _get(contents, "tokens")
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := _get(contents, f"{key}_token_id")) is not None
    }
    backend.post_processor = _framing(contents, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=contents.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    _check_encoding(contents, tokenizer)
    return tokenizer


def end_tokens(contents: GgufContents) -> list[int]:
    """Ids that end a generated text: of a text, of a turn, of a message, as far as the file names them."""
    ids = [_get(contents, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(index for index in ids if index is not None))


def _framing(contents: GgufContents, special: dict[str, str]) -> Any:
    """The post-processor that puts beginning- and end-of-text tokens where the file, or llama.cpp's default, does."""
    from tokenizers import processors

    sentencepiece = _get(contents, "model") == "llama"
    begins = sentencepiece or PRE_TOKENIZERS[_get(contents, "pre", "default")].begins_texts
    added = {}
    for key, default in (("bos", begins), ("eos", False)):
        if _get(contents, f"add_{key}_token", default and f"{key}_token" in special):
            added[key] = special[f"{key}_token"]
    template = " ".join(filter(None, (added.get("bos"), "$A", added.get("eos"))))
    ids = [(token, _get(contents, f"{key}_token_id")) for key, token in added.items()]
    return processors.TemplateProcessing(single=template, pair=None, special_tokens=ids)


def _check_encoding(contents: GgufContents, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = _get(contents, "tokens")
    kinds = _get(contents, "token_type", [NORMAL] * len(tokens))
    way_out = "install another version of transformers (5 reads more of them than 4), or take the original model"
    texts = _texts(contents, tokenizer, [index for index, kind in enumerate(kinds) if kind == NORMAL])
    whole = sum(_encoded(tokenizer, text) == [index] for index, text in texts.items())
    if whole < _LEAST_WHOLE * len(texts):
        raise contents.refusal(
            f"transformers reads its tokenizer wrongly: {whole} of {len(texts)} tokens are encoded as themselves; "
            f"{way_out}"
        )
    vocabulary = tokenizer.get_vocab()
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == CONTROL and vocabulary.get(token) == index and _encoded(tokenizer, token) != [index]:
            raise contents.refusal(f"transformers cuts its special token {token!r} into pieces; {way_out}")
    if _get(contents, "model") == "llama":
        prefixed = tokenizer.convert_ids_to_tokens(_encoded(tokenizer, "a"))[0].startswith("\u2581")
        if prefixed != (wanted := _get(contents, "add_space_prefix", True)):
            raise contents.refusal(f"transformers ignores its tokenizer.ggml.add_space_prefix={wanted}; {way_out}")


def _texts(contents: GgufContents, tokenizer: PreTrainedTokenizerFast, normal: list[int]) -> dict[int, str]:
    """Token ids and the texts that should be encoded as these single tokens, for a sample of ``normal``."""
    if _get(contents, "model") == "gpt2":
        sampled = normal[:: max(1, len(normal) // _SAMPLE)]
        found = {index: str(tokenizer.decode([index])) for index in sampled}
        # Parts of a character have no text of their own.
        return {index: text for index, text in found.items() if text.strip() and "\ufffd" not in text}
    tokens, space = _get(contents, "tokens"), "\u2581"
    prefix = space if _get(contents, "add_space_prefix", True) else ""
    words = [index for index in normal if tokens[index].startswith(prefix) and tokens[index].strip(space)]
    sampled = words[:: max(1, len(words) // _SAMPLE)]
    return {index: tokens[index].removeprefix(prefix).replace(space, " ") for index in sampled}


def _encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _get(contents: GgufContents, key: str, default: Any = None) -> Any:
    return contents.metadata.get(f"tokenizer.ggml.{key}", default)
