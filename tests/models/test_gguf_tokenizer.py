"""The tokenizer of a GGUF file is the file's under every version of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_of_model import byte_level_metadata, write_model
from transformers import PreTrainedTokenizerBase

from usllm.models import ModelSpec
from usllm.models.loading import load_generation_config, load_tokenizer
from usllm.system.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


def spec(folder: Path, metadata: dict[str, Any], name: str = "llama") -> ModelSpec:
    path = folder / "model.gguf"
    write_model(path, name, metadata=metadata)
    return ModelSpec(kind="gguf", name=None, file=str(path))


def tokenizer(folder: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    return load_tokenizer(spec(folder, metadata))


def with_tokens(*tokens: str, merges: list[str]) -> dict[str, Any]:
    """Metadata with more tokens and the merges that make them."""
    entries = byte_level_metadata()
    entries["tokenizer.ggml.tokens"] += tokens
    entries["tokenizer.ggml.token_type"] += [1] * len(tokens)
    entries["tokenizer.ggml.merges"] += merges
    return entries


@pytest.mark.parametrize(("adds", "first"), [(True, [256]), (False, []), (None, [])])
def test_beginning_of_text_is_what_the_file_says(adds: bool | None, first: list[int], tmp_path: Path) -> None:
    made = tokenizer(tmp_path, {"tokenizer.ggml.add_bos_token": adds})
    assert made("ab").input_ids == [*first, 257]


def test_llama_3_begins_texts_where_the_file_does_not_say(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.pre": "llama-bpe"})
    assert made("ab").input_ids == [256, 257]


def test_end_of_text_is_added_where_the_file_says(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, {"tokenizer.ggml.add_eos_token": True})("ab").input_ids == [257, 256]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("smollm", "a  1", ["a", "\u0120\u0120", "1"]),
        ("gpt-2", "a  1", ["a", "\u0120", "\u01201"]),
        ("llama-bpe", "DON'T", ["DON", "'T"]),
        ("gpt-2", "DON'T", ["DON", "'", "T"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    made = tokenizer(tmp_path, {"tokenizer.ggml.pre": pre})
    assert [piece for piece, _ in made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_special_tokens_are_the_numbers_in_the_file(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, {"tokenizer.ggml.eos_token_id": 258, "tokenizer.ggml.padding_token_id": 257})
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (256, 258, 257)


def test_chat_template_and_ends_of_turns_come_along(tmp_path: Path) -> None:
    place = spec(tmp_path, {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eot_token_id": 258})
    assert load_tokenizer(place).chat_template == "{{ messages }}"
    found = load_generation_config(place)
    assert found is not None
    assert found.eos_token_id == [256, 258]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "no-such-split"}, "pre='no-such-split' is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "model='bert' is not supported"),
        ({"tokenizer.ggml.add_sep_token": True}, "add_sep_token=True"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "bos_token_id=9999 is none of its 259 tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "differ in length"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "there is no bos_token_id"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
    ],
)
def test_what_no_tokenizer_here_does_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer(tmp_path, metadata)


def test_vocabulary_whose_merges_are_lost_is_refused(tmp_path: Path) -> None:
    words = [first + second for first in "cdefgh" for second in "cdefgh"]
    whole = with_tokens(*words, merges=[" ".join(word) for word in words])
    sizes = {"llama.vocab_size": None}
    assert load_tokenizer(spec(tmp_path, whole | sizes, "llama-wide"))("cd").input_ids == [260]
    with pytest.raises(UserError, match=r"\d+ of \d+ tokens are encoded as themselves"):
        load_tokenizer(spec(tmp_path, whole | sizes | {"tokenizer.ggml.merges": ["a b", "b a"]}, "llama-wide"))


def test_prefix_that_transformers_ignores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"add_space_prefix=True|tokens are encoded as themselves"):
        load_tokenizer(spec(tmp_path, {"tokenizer.ggml.add_space_prefix": True}, "gemma3"))
