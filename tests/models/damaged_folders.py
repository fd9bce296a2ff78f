"""Folders of a tiny dense Llama, whole and with one thing wrong each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from usllm.models.random_model import byte_tokenizer

Change = Callable[[Path], None]


def write_folder(path: Path, tied: bool = False, shards: bool = False, architecture: str = "llama") -> None:
    """A dense model and its tokenizer, of two layers, in one file or in several."""
    config = AutoConfig.for_model(
        architecture,
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path, max_shard_size="100KB" if shards else "5GB")
    byte_tokenizer().save_pretrained(path)


def configured(**settings: Any) -> Change:
    """Other settings in config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def tensors(change: Callable[[dict[str, Tensor]], None]) -> Change:
    """Other tensors in model.safetensors."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, path, {"format": "pt"})

    return apply


def without(*stems: str) -> Change:
    """Tensors left out whose names hold one of ``stems``."""

    def change(values: dict[str, Tensor]) -> None:
        for name in [name for name in values if any(stem in name for stem in stems)]:
            del values[name]

    return tensors(change)


def renamed(old: str, new: str) -> Change:
    """``old`` replaced in the names of all tensors."""

    def change(values: dict[str, Tensor]) -> None:
        for name in list(values):
            values[name.replace(old, new)] = values.pop(name)

    return tensors(change)


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """One tensor made anew from itself."""
    return tensors(lambda values: values.update({name: make(values[name].clone())}))


def added(name: str, tensor: Tensor) -> Change:
    """One more tensor."""
    return tensors(lambda values: values.update({name: tensor}))


def cut(share: float) -> Change:
    """model.safetensors cut short."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return change


def third_layer(values: dict[str, Tensor]) -> None:
    """One layer more than the configuration says."""
    for name in [name for name in values if ".layers.1." in name]:
        values[name.replace(".layers.1.", ".layers.2.")] = values[name].clone()


def without_second_shard(folder: Path) -> None:
    """One of several weight files lost."""
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "head missing": ({}, without("lm_head"), r"1 tensor is missing \(lm_head\.weight\)"),
    "projection missing": ({}, without(DOWN), rf"1 tensor is missing \({DOWN}\)"),
    "norm missing": ({}, without("model.norm"), r"missing \(model\.norm\.weight\)"),
    "embedding missing": ({}, without("embed_tokens"), "embed_tokens"),
    "all attention missing": ({}, without("self_attn"), r"8 tensors are missing \(.*, …\)"),
    "one more layer in the file": ({}, tensors(third_layer), r"9 tensors are not part of the model \(model\.layers\.2"),
    "one more layer configured": ({}, configured(num_hidden_layers=3), r"9 tensors are missing \(model\.layers\.2"),
    "one layer less configured": ({}, configured(num_hidden_layers=1), "9 tensors are not part of the model"),
    "all names renamed": ({}, renamed("model.", "transformer."), "missing|corrupted"),
    "one kind renamed": ({}, renamed("q_proj", "query"), r"2 tensors are missing .*2 tensors are not part"),
    "odd tensor": ({}, added("model.layers.0.self_attn.sinks", torch.zeros(4)), "not part of the model .*sinks"),
    "bias that is not configured": ({}, added("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), "q_proj.bias"),
    "bias configured, not stored": ({}, configured(attention_bias=True), "8 tensors are missing"),
    "wider": (
        {},
        replaced(DOWN, lambda w: torch.cat([w, w], 1)),
        rf"1 tensor is of another shape than the model's \({DOWN}",
    ),
    "other vocabulary": ({}, configured(vocab_size=300), "2 tensors are of another shape"),
    "other hidden size": ({}, configured(hidden_size=32), "21 tensors are of another shape"),
    "other intermediate size": ({}, configured(intermediate_size=128), "6 tensors are of another shape"),
    "tied, with another head": ({}, configured(tie_word_embeddings=True), "lm_head.weight in its weight files"),
    "untied, without a head": ({"tied": True}, configured(tie_word_embeddings=False), r"missing \(lm_head"),
    "NaN": ({}, replaced(DOWN, lambda w: w.fill_(float("nan"))), rf"not finite.*{DOWN}"),
    "one infinite number": (
        {},
        replaced("model.norm.weight", lambda w: w.index_fill_(0, torch.tensor(3), torch.inf)),
        "norm",
    ),
    "shard lost": ({"shards": True}, without_second_shard, "cannot be loaded"),
    "cut in half": ({}, cut(0.5), "cannot be loaded"),
    "cut in the header": ({}, cut(0.001), "cannot be loaded"),
    "empty": ({}, cut(0), "cannot be loaded"),
    "architecture of another family": ({}, configured(model_type="gpt2"), "missing|cannot be loaded"),
    "no decoder": ({}, configured(model_type="clip"), "not a decoder-only|cannot be loaded"),
    "other quantisation": (
        {},
        configured(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        "is quantised \\(gptq\\)",
    ),
    "qwen3 without its norms": ({"architecture": "qwen3"}, without("q_norm"), "2 tensors are missing"),
    "qwen2 without its biases": ({"architecture": "qwen2"}, without("bias"), "6 tensors are missing"),
    "llama read as qwen3": ({}, configured(model_type="qwen3"), "4 tensors are missing|missing"),
    "llama read as qwen2": ({}, configured(model_type="qwen2"), "6 tensors are missing"),
}
"""Name to (arguments of :func:`write_folder`, what is changed, what the refusal says)."""

WHOLE: dict[str, tuple[dict[str, Any], Change]] = {
    "untied": ({}, lambda folder: None),
    "tied": ({"tied": True}, lambda folder: None),
    "tied, the head stored again": (
        {"tied": True},
        tensors(lambda values: values.update({"lm_head.weight": values["model.embed_tokens.weight"].clone()})),
    ),
    "shards": ({"shards": True}, lambda folder: None),
    "bf16": ({}, tensors(lambda values: values.update({n: v.bfloat16() for n, v in values.items()}))),
    "qwen2": ({"architecture": "qwen2"}, lambda folder: None),
    "qwen3": ({"architecture": "qwen3"}, lambda folder: None),
}
"""Name to (arguments of :func:`write_folder`, what is changed) of folders that load."""
