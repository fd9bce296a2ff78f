"""Tiny untrained models and a byte tokenizer: everything a test needs, with no file and no network."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def random_config(architecture: str) -> PretrainedConfig:
    """Configuration with two layers of width 64, grouped-query attention and tied embeddings (~0.1 M weights)."""
    return AutoConfig.for_model(
        architecture,
        vocab_size=264,  # 256 bytes and the end-of-text token, rounded up to a multiple of 8
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )


def random_model(architecture: str) -> PreTrainedModel:
    """The model of :func:`random_config` in fp32; always the same weights, and the global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(random_config(architecture), dtype=torch.float32)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 (ids 0 to 255) and ``<|endoftext|>`` (256); adds no special tokens by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 gives token types too, which no Llama takes
    )
