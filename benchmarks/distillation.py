"""Memory and time of full-vocabulary distillation: the loss inside the head against logits that exist whole.

    python benchmarks/distillation.py [--vocabulary 262144] [--hidden 640] [--tokens 1024]

A decoder of two layers with a large vocabulary and its teacher, one step of KL forward and backward. Each way runs in a
process of its own; memory is the peak above what the two models take before the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from usllm.system.machine import machine, machine_line
from usllm.training.objectives import Distill

WAYS = ("in the head", "whole")


def memory() -> int:
    """Anonymous memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Peak(threading.Thread):
    """The most memory of this process while it runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._ended = memory(), threading.Event()

    def run(self) -> None:
        """Look until the end."""
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, memory())

    def end(self) -> int:
        """Stop looking; the peak, bytes."""
        self._ended.set()
        self.join()
        return self.bytes


def whole_logits(model: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """The same KL from logits of all positions."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits.float(), -1)
    found = F.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
    return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def measure(way: str, vocabulary: int, hidden: int, tokens: int) -> dict[str, float]:
    """Peak bytes above the models, seconds and loss of one step."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))
    objective = Distill(hidden_weight=0.0)
    objective.attach(LlamaForCausalLM(model.config))
    teacher = objective.networks()[0]
    ids = torch.randint(0, vocabulary, (max(tokens // 256, 1), 256))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there in every step but the first
    before, peak = memory(), Peak()
    peak.start()
    started = time.perf_counter()
    loss = whole_logits(model, teacher, ids) if way == "whole" else objective.loss(model, {"input_ids": ids})[0]
    loss.backward()
    return {"bytes": peak.end() - before, "seconds": time.perf_counter() - started, "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.way:
        print(json.dumps(measure(found.way, found.vocabulary, found.hidden, found.tokens)))
        return
    print(machine_line(machine()))
    print(f"vocabulary {found.vocabulary:,}, hidden {found.hidden}, {found.tokens:,} tokens")
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
        row = results[way]
        print(f"{way:<12} {row['bytes'] / 1e9:6.2f} GB  {row['seconds']:6.1f} s  loss {row['loss']:.5f}")
    head, whole = (results[way] for way in WAYS)
    print(f"memory {head['bytes'] / whole['bytes']:.2f} of whole logits, time {head['seconds'] / whole['seconds']:.2f}")


if __name__ == "__main__":
    main()
