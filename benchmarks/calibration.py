"""Measuring E[a²] on SmolLM2-135M against the forward passes that it needs.

python benchmarks/calibration.py [--sequences 8] [--context 512]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch

from usllm.calibration import SecondMoments
from usllm.compress import swap_linears_
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.system.machine import choose_precision, machine, machine_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    model = load_dense(ModelSpec())
    layers = swap_linears_(model)
    bf16 = choose_precision("auto", "cpu") == "bf16-mixed"
    batches = torch.randint(0, model.config.vocab_size, (arguments.sequences, 1, arguments.context))
    seconds: dict[str, list[float]] = {"forward": [], "calibration": []}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.model(batches[0], use_cache=False)
        for batch in batches:  # turn by turn, so that the machine's drift meets both alike
            for name, moments in (("forward", contextlib.nullcontext()), ("calibration", SecondMoments(layers))):
                started = time.perf_counter()
                with moments:
                    model.model(batch, use_cache=False)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{machine_line(machine())}; {arguments.sequences} sequences of {arguments.context} tokens")
    print(f"forward {medians['forward']:.3f} s, with E[a²] {medians['calibration']:.3f} s a sequence")
    print(f"calibration / forward: {medians['calibration'] / medians['forward']:.3f}")


if __name__ == "__main__":
    main()
