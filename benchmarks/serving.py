"""Tokens a second at batch 1: a packed model in vLLM, the dense one in vLLM, and the packed one in transformers.

    .venv-vllm/bin/python benchmarks/serving.py packed [--tokens 64] [--repeats 3] [--eager]

In the environment of ``make test-vllm``. Every engine has a process of its own, on the threads that OMP_NUM_THREADS
says. The dense model should be the one that the packed one was made of: SmolLM2-135M-Instruct in bf16, or that of
``--dense`` (``packed.py --shapes Llama-3.2-1B --folder …`` makes both). Engines take turns, ``--repeats`` times: what
else the machine does then meets all of them. Tokens a second leave out starting and the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.side_by_side_measure import VLLM_ALONE
from usllm.system.machine import machine, machine_line

PROMPT = "The list method append adds an item to the end of the list. The list method extend"
ENGINES = ("vLLM, packed", "vLLM, dense bf16", "transformers, packed")


def in_vllm(folder: str, tokens: int, eager: bool) -> float:
    """Tokens a second of ``LLM``."""
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="bfloat16", max_model_len=1024, max_num_seqs=4, enforce_eager=eager)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - started

    seconds(tokens)  # compiles what is compiled at first use
    return (tokens - 1) / (seconds(tokens) - seconds(1))


def in_transformers(folder: str, tokens: int) -> float:
    """Tokens a second of ``generate``."""
    from transformers import AutoTokenizer

    import usllm

    model: Any = usllm.load(folder, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    def seconds(count: int) -> float:
        started = time.perf_counter()
        model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options)
        return time.perf_counter() - started

    seconds(tokens)
    return (tokens - 1) / (seconds(tokens) - seconds(1))


def dense_folder(folder: Path, tokenizer_of: str) -> None:
    """SmolLM2-135M-Instruct as it is, in bf16."""
    from transformers import AutoTokenizer

    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense

    model: Any = load_dense(ModelSpec())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)


def measured(engine: str, folder: str, tokens: int, eager: bool) -> float:
    """Tokens a second of an engine in a process of its own."""
    command = [sys.executable, __file__, folder, "--engine", engine, "--tokens", str(tokens)]
    done = subprocess.run(
        [*command, *(["--eager"] if eager else [])],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **VLLM_ALONE},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-4000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("packed")
    parser.add_argument("--dense", help="folder of the dense model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--engine", choices=ENGINES, help="measure this one here, and print the number")
    given = parser.parse_args()
    if given.engine is not None:
        ours = given.engine == ENGINES[2]
        rate = in_transformers(given.packed, given.tokens) if ours else in_vllm(given.packed, given.tokens, given.eager)
        print(json.dumps(rate))
        return
    found: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as root:
        dense = Path(given.dense) if given.dense else Path(root) / "dense"
        if not given.dense:
            dense_folder(dense, given.packed)
        for _ in range(given.repeats):
            for engine in ENGINES:
                folder = str(dense) if engine == ENGINES[1] else given.packed
                found[engine].append(measured(engine, folder, given.tokens, given.eager))
    dense_rate = statistics.median(found[ENGINES[1]])
    print(machine_line(machine()))
    print(f"{torch.get_num_threads()} threads, {given.tokens} tokens, {'eager' if given.eager else 'compiled'}\n")
    print("| | tokens/s, median | over dense in vLLM | all |\n|---|---|---|---|")
    for engine, rates in found.items():
        rate = statistics.median(rates)
        every = ", ".join(f"{value:.1f}" for value in rates)
        print(f"| {engine} | {rate:.1f} | {rate / dense_rate:.2f} | {every} |")


if __name__ == "__main__":
    main()
