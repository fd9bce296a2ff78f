"""Models of transformers as GGUF files, written the way llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from usllm.models.gguf_writer import add_entry

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32, "tie_word_embeddings": False}),
    "llama-wide": ("llama", {"vocab_size": 320}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-scaled": ("llama", {"head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_theta": 1e6}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "rope_theta": 1e6,
            "rope_local_base_freq": 20_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 256}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.25, 1.5, 1.5, 2.0, 2.0, 2.5],
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0],
            },
        },
    ),
}
"""Name to (model type, settings beyond :data:`SIZES`) of a tiny model of each kind that is read."""


def tiny_model(name: str) -> PreTrainedModel:
    """One of :data:`MODELS` in fp32, with norms and biases that are not those of a fresh model."""
    kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(SIZES | settings))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_model(
    path: Path,
    name: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> PreTrainedModel:
    """Write one of :data:`MODELS`; returns it.

    Args:
        path: of the file.
        name: of the model.
        metadata: entries set (or, as ``None``, left out) after all others.
        tensors: changes the tensors, fp32 ``[out, in]`` by GGUF name, before they are written.
    """
    model = tiny_model(name)
    architecture = name.partition("-")[0].replace("llama3", "llama")
    tokenizer = sentencepiece_metadata if architecture.startswith(("gemma", "phi3")) else byte_level_metadata
    entries = {**_metadata(model, architecture, MODELS[name][1]), **tokenizer(), **(metadata or {})}
    if architecture == "phi3":
        entries["tokenizer.ggml.add_space_prefix"] = True
    values = _tensors(model, architecture, MODELS[name][1])
    if tensors is not None:
        tensors(values)
    write_gguf(path, architecture, entries, values)
    return model


def write_gguf(path: Path, architecture: str, entries: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A GGUF file of these metadata entries and tensors."""
    writer = GGUFWriter(str(path), architecture)
    for key, value in entries.items():
        if value is not None:
            add_entry(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_metadata() -> dict[str, Any]:
    """256 bytes, ``<|endoftext|>`` and a few merges, as GPT-2's tokenizer."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "ab", "ba"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1, 1],
        "tokenizer.ggml.merges": ["a b", "b a"],  # transformers 4.57 misreads a list of one
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """Four special tokens, 256 bytes, two letters and what they merge to, as Gemma's tokenizer."""
    pieces = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581b", "\u2581ab"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(place) for place in range(1, 8)],
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _metadata(model: PreTrainedModel, architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = settings.get("rope_scaling") or {}
    entries: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": settings.get("rope_theta", 10_000.0),
        "attention.key_length": width,
        "attention.value_length": width,
    }
    if architecture in ("llama", "phi3"):
        entries["rope.dimension_count"] = width
    if architecture in ("gemma2", "gemma3"):
        entries["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        entries["attn_logit_softcapping"] = config.attn_logit_softcapping
        entries["final_logit_softcapping"] = config.final_logit_softcapping
    if (local := settings.get("rope_local_base_freq", 10_000.0)) != 10_000.0:
        entries["rope.freq_base_swa"] = local
    if scaling.get("rope_type") == "linear":
        entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if scaling.get("type") == "longrope":
        original = settings["original_max_position_embeddings"]
        ratio = config.max_position_embeddings / original
        entries["rope.scaling.original_context_length"] = original
        entries["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(ratio) / np.log(original)))
    return {f"{architecture}.{key}": value for key, value in entries.items()}


def _tensors(model: PreTrainedModel, architecture: str, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    config = model.config
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        tensor = parameter.detach().numpy().copy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        found[stored] = tensor
    scaling = settings.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_divisors(config.head_dim, settings["rope_theta"], scaling)
    for length in ("long", "short"):
        if factors := scaling.get(f"{length}_factor"):
            found[f"rope_factors_{length}.weight"] = np.array(factors, dtype=np.float32)
    return found


def llama3_divisors(width: int, base: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """Divisors of the frequencies, fp32 ``[width / 2]``, from the definition by wavelengths."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for pair in range(width // 2):
        wave = 2 * np.pi * base ** (2 * pair / width)
        if wave < context / high:
            found.append(1.0)
        elif wave > context / low:
            found.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)
