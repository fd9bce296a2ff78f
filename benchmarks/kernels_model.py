"""One training step and a few generated tokens of a Llama of random weights, through the kernels (for kernels.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from usllm.compress import allocate_, compressed_layers, reproject_, swap_linears_
from usllm.packed.config import PackedLayerEntry
from usllm.packed.layouts import choose_layouts_
from usllm.packed.linear import PackedLinear
from usllm.sketch import SketchConfig

NEW_TOKENS = 8
PRODUCTS = ("aten::mm", "aten::addmm", "aten::matmul")


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


def model_step(device: torch.device, layers: int, width: int, sketch: SketchConfig, tokens: int) -> None:
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
    swap_linears_(model)
    found = compressed_layers(model)
    generator = torch.Generator().manual_seed(0)
    importance = {name: torch.rand(layer.in_features, generator=generator) ** 8 + 1e-3 for name, layer in found.items()}
    started = time.perf_counter()
    allocate_(model, sketch, importance)
    print(
        f"{sketch.allocation}, {sketch.rows} rows: {len(found)} layers planned and projected"
        f" in {time.perf_counter() - started:.1f} s"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    results = [step(lambda: reproject_(model)) for _ in range(2)]
    sketched, projecting, loss = min(results)
    peak = _peak(device)
    print(f"step: dense {dense:.2f} s, sketched {sketched:.2f} s, ratio {sketched / dense:.3f}; loss {loss:.3f}")
    print(f"re-projection of all layers {projecting:.2f} s, {projecting / sketched:.1%} of the step")
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            step(lambda: reproject_(model))
        events = profiled.events()
        busy = card_time(events)
        ours = sketch_time(events, "device_time_total")
        print(
            f"on the card: {ours / 1e3:.1f} of {busy / 1e3:.1f} ms in the sketch, {ours / busy:.1%} (target: under 5%)"
        )
    if peak is not None and peak_dense is not None:
        print(f"peak memory: dense {peak_dense / 2**30:.2f} GiB, sketched {peak / 2**30:.2f} GiB")
    optimizer.param_groups.clear()  # lets go of the latents
    pack_(model)
    speeds = {}
    for layout in ("compact", "expanded", "decoded"):
        choose_layouts_(model, layout)
        speeds[layout] = _generate(model, batch)
    words = ", ".join(f"{layout} {speed:.2f} ({speed / speeds['decoded']:.2f})" for layout, speed in speeds.items())
    print(f"generation in bf16, tokens/s (over decoded): {words}")


def pack_(model: Any) -> None:
    """Trained layers as packed ones, everything else in bfloat16; in place."""
    for name, layer in compressed_layers(model).items():
        plan = layer.plan
        assert plan is not None
        packed = plan.pack({key: value.cpu() for key, value in layer.states.items()})
        inference = PackedLinear(PackedLayerEntry(layer.shape, packed.numel()), plan.compressor, name)
        inference.packed.copy_(packed)
        model.set_submodule(name, inference.to(layer.weight.device))
    model.to(torch.bfloat16)


def sketch_time(events: Iterable[Any], attribute: str) -> float:
    """Microseconds that profiled events spent in our operators, without the library's products inside of them.

    Args:
        events: of ``torch.profiler.profile.events()``.
        attribute: ``device_time_total`` or ``cpu_time_total``.
    """
    return sum(_own_time(event, attribute) for event in events if _is_outermost(event))


def card_time(events: Iterable[Any]) -> float:
    """Microseconds that a card was busy: of its own events, as operators are given the time of their kernels again."""
    return sum(
        float(event.self_device_time_total)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )


def _is_outermost(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("usllm::"):
        parent = parent.cpu_parent
    return parent is None and event.name.startswith("usllm::")


def _own_time(event: Any, attribute: str) -> float:
    return float(getattr(event, attribute)) - sum(_product_time(child, attribute) for child in event.cpu_children)


def _product_time(event: Any, attribute: str) -> float:
    if event.name in PRODUCTS:
        return float(getattr(event, attribute))
    return sum(_product_time(child, attribute) for child in event.cpu_children)


def _generate(model: nn.Module, batch: torch.Tensor) -> float:
    """Tokens per second after the first one, whose prompt and compilation are left out."""
    model.eval()

    def seconds(tokens: int) -> float:
        _wait(batch.device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(batch[:, :16], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        _wait(batch.device)
        return time.perf_counter() - started

    seconds(2)
    first = seconds(1)
    return NEW_TOKENS / (seconds(NEW_TOKENS + 1) - first)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None
