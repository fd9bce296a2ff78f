"""A training step of SmolLM2-135M, compressed against dense: time and peak memory.

    python benchmarks/training_step.py [--tokens 2048] [--context 512] [--steps 5] [--against rounding littlebit]

Each mode runs in a process of its own, so that peak memory is its own; the modes take turns twice and are compared by
their best. A step is forward, backward, clipping, AdamW and, sketched, the re-projection that the paper does each step.
Rounding is at one bit with a scale a row, LittleBit at one bit.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from usllm.compress import allocate_, compressed_layers, reproject_, swap_linears_
from usllm.compress.methods.littlebit import LittleBitCompressor
from usllm.compress.methods.rounding import RoundingCompressor
from usllm.littlebit import LittleBitConfig
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.rounding import RoundingConfig
from usllm.sketch import SketchConfig
from usllm.system.machine import choose_precision, machine, machine_line
from usllm.training.objectives import CrossEntropy

METHODS = {
    "sketched": lambda: SketchConfig(bits_per_weight=0.5, rows=3),
    "rounding": lambda: RoundingCompressor(RoundingConfig(bits=1)),
    "littlebit": lambda: LittleBitCompressor(LittleBitConfig(bits_per_weight=1.0)),
}


def measure(mode: str, tokens: int, context: int, steps: int) -> dict[str, float]:
    """Median seconds a step and peak resident bytes of this process."""
    torch.manual_seed(0)
    model = load_dense(ModelSpec())
    if mode != "dense":
        swap_linears_(model)
        generator = torch.Generator().manual_seed(0)
        layers = compressed_layers(model)
        importance = {n: torch.rand(layer.in_features, generator=generator) ** 8 + 1e-3 for n, layer in layers.items()}
        allocate_(model, METHODS[mode](), importance)
    model.train()
    objective = CrossEntropy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    bf16 = choose_precision("auto", "cpu") == "bf16-mixed"
    batch = torch.randint(0, model.config.vocab_size, (tokens // context, context))
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = objective.loss(model, {"input_ids": batch, "labels": batch})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if mode == "sketched":
            reproject_(model)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--against", nargs="+", default=["sketched"], choices=METHODS, help="methods to compare")
    parser.add_argument("--mode", choices=("dense", *METHODS), help="measure one mode and print JSON")
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(measure(arguments.mode, arguments.tokens, arguments.context, arguments.steps)))
        return
    modes = ["dense", *arguments.against]
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for mode in modes * 2:
        command = [sys.executable, __file__, "--mode", mode, "--tokens", str(arguments.tokens)]
        command += ["--context", str(arguments.context), "--steps", str(arguments.steps)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[mode].append(json.loads(printed.splitlines()[-1]))
    print(f"{machine_line(machine())}; {arguments.tokens} tokens a step")
    best = {mode: {key: min(run[key] for run in runs) for key in ("seconds", "peak")} for mode, runs in results.items()}
    for mode, run in best.items():
        print(f"{mode:9} {run['seconds']:7.2f} s a step, peak {run['peak'] / 2**30:5.2f} GiB")
    for mode in arguments.against:
        ratios = {key: best[mode][key] / best["dense"][key] for key in ("seconds", "peak")}
        print(f"{mode} / dense: time {ratios['seconds']:.3f}, peak memory {ratios['peak']:.3f}")


if __name__ == "__main__":
    main()
