"""Windows under both rules: no token of the text is lost, doubled or out of order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from usllm.data.windows import EACH, NONE, cut_windows, family_rule, resolved_rule, start_token
from usllm.models.random_model import END_OF_TEXT, byte_tokenizer
from usllm.system.errors import UserError

BOS = 9


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12))
def test_without_a_token_windows_are_the_text(stream: list[int], length: int) -> None:
    windows, used = cut_windows(np.array(stream, dtype=np.int64), length, None)
    assert windows.shape == (len(stream) // length, length)
    assert windows.flatten().tolist() == stream[:used]
    assert len(stream) - used < length


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(2, 12))
def test_each_window_holds_the_token_and_one_token_of_text_less(stream: list[int], length: int) -> None:
    windows, used = cut_windows(np.array(stream, dtype=np.int64), length, BOS)
    assert windows.shape == (len(stream) // (length - 1), length)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == stream[:used]


@given(st.lists(st.integers(0, BOS), max_size=60), st.integers(2, 12))
def test_a_token_that_the_text_has_there_is_not_doubled(stream: list[int], length: int) -> None:
    windows, used = cut_windows(np.array(stream, dtype=np.int64), length, BOS)
    rest, expected = list(stream), []
    while True:
        text = rest[1:] if rest[:1] == [BOS] else rest
        if len(text) < length - 1:
            break
        expected.append([BOS, *text[: length - 1]])
        rest = text[length - 1 :]
    assert windows.tolist() == expected
    assert rest == stream[used:]


@given(st.lists(st.integers(0, BOS), max_size=60), st.integers(2, 12), st.integers(0, 60), st.sampled_from([None, BOS]))
def test_a_stream_in_two_parts_gives_the_same_windows(
    stream: list[int], length: int, cut: int, first: int | None
) -> None:
    ids = np.array(stream, dtype=np.int32)
    whole, _ = cut_windows(ids, length, first)
    head, used = cut_windows(ids[:cut], length, first)
    tail, _ = cut_windows(ids[used:], length, first)
    assert np.concatenate([head, tail]).tolist() == whole.tolist()


@pytest.mark.parametrize(("model_type", "rule"), [("llama", NONE), ("qwen3", NONE), ("gemma", EACH)])
def test_rule_of_a_family(model_type: str, rule: str) -> None:
    assert family_rule(model_type) == rule
    assert resolved_rule("auto", model_type, byte_tokenizer(), "x") == rule


def test_every_gemma_that_transformers_knows_gets_its_token() -> None:
    types = [config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING if "gemma" in config.__name__.lower()]
    assert len(types) >= 5
    assert {family_rule(name) for name in types} == {EACH}


@pytest.mark.parametrize("asked", ["none", "each"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_was_asked_for_wins_over_the_family(asked: str, model_type: str) -> None:
    assert resolved_rule(asked, model_type, byte_tokenizer(), "x") == asked


def test_tokenizer_without_the_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert resolved_rule("auto", "gemma", tokenizer, "x") == NONE
    with pytest.raises(UserError, match=r"data\.window_start=each.*no beginning-of-text token.*use none"):
        resolved_rule("each", "llama", tokenizer, "data.window_start")


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"x=all: unknown; choose one of auto, none, each"):
        resolved_rule("all", "llama", byte_tokenizer(), "x")


def test_the_token_is_the_tokenizers() -> None:
    tokenizer = byte_tokenizer()
    assert start_token(EACH, tokenizer) == tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert start_token(NONE, tokenizer) is None
