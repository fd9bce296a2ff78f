"""Tiny models are the same every time and disturb nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm.models.random_model import byte_tokenizer, random_config, random_model
from usllm.models.spec import RANDOM_ARCHITECTURES


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
def test_same_weights_every_time(architecture: str) -> None:
    first, second = random_model(architecture).state_dict(), random_model(architecture).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_global_rng_is_left_alone() -> None:
    before = torch.get_rng_state()
    random_model("llama")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
def test_embeddings_are_tied_and_attention_is_grouped(architecture: str) -> None:
    model = random_model(architecture)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    if tokenizer.eos_token in text:
        return
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_vocabulary_fits_the_model() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) <= random_config("llama").vocab_size
