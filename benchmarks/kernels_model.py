"""One training step and a few generated tokens of a Llama of random weights, through the kernels (for kernels.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from usllm.nn import allocate_, reproject_, sketched_layers, swap_linears_
from usllm.sketch import SketchConfig

NEW_TOKENS = 8


def llama(layers: int, width: int) -> Any:
    """Llama-3.2-1B's shape, or a smaller one of the same proportions; weights random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def model_step(device: torch.device, layers: int, width: int, bits: float, rows: int, tokens: int) -> None:
    """Dense and sketched step time, their peak memory on a card, time in the sketch, and generation."""
    torch.manual_seed(0)
    started = time.perf_counter()
    with device:
        model = llama(layers, width)
    model.train()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nLlama of {count / 1e9:.2f} billion random weights, {tokens} tokens a step, SGD, bf16 autocast")
    batch = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    # Plain SGD: on a small machine the moments of Adam would be the largest thing in memory.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(after: Callable[[], object]) -> tuple[float, float, float]:
        _settle(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        between = time.perf_counter()
        after()
        _wait(device)
        value = float(loss.detach())
        return time.perf_counter() - begun, time.perf_counter() - between, value

    print(f"made in {time.perf_counter() - started:.0f} s")
    dense = min(step(lambda: None)[0] for _ in range(2))
    peak_dense = _peak(device)
    generated_dense = _generate(model, batch)
    swap_linears_(model)
    found = sketched_layers(model)
    generator = torch.Generator().manual_seed(0)
    importance = {name: torch.rand(layer.in_features, generator=generator) ** 8 + 1e-3 for name, layer in found.items()}
    started = time.perf_counter()
    allocate_(model, SketchConfig(bits_per_weight=bits, rows=rows), importance)
    print(f"{len(found)} layers planned and projected in {time.perf_counter() - started:.1f} s")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    results = [step(lambda: reproject_(model)) for _ in range(2)]
    sketched, projecting, loss = min(results)
    peak = _peak(device)
    generated = _generate(model, batch)
    print(f"step: dense {dense:.2f} s, sketched {sketched:.2f} s, ratio {sketched / dense:.3f}; loss {loss:.3f}")
    print(f"re-projection of all layers {projecting:.2f} s, {projecting / sketched:.1%} of the step")
    if peak is not None and peak_dense is not None:
        print(f"peak memory: dense {peak_dense / 2**30:.2f} GiB, sketched {peak / 2**30:.2f} GiB")
    print(f"generation, {NEW_TOKENS} tokens: dense {generated_dense:.2f} s, sketched {generated:.2f} s")


def _generate(model: nn.Module, batch: torch.Tensor) -> float:
    model.eval()
    _wait(batch.device)
    started = time.perf_counter()
    with torch.inference_mode(), torch.autocast(batch.device.type, torch.bfloat16):
        model.generate(batch[:, :16], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    _wait(batch.device)
    model.train()
    return time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None
