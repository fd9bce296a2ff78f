"""One model measured in a process of its own: speed, memory, perplexity. With llama.cpp torch is never imported.

Speed is counted by one of two clocks: ``wall``, or ``cpu``, the seconds that this process has computed, which other
work on the machine does not change. With one thread the two are the same on an idle machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
LONG = 512
"""Tokens of the prompt whose speed is measured."""
VLLM_ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
"""Surroundings in which vLLM computes in the process that asks it, with the threads that OMP_NUM_THREADS says."""


def peak_resident() -> int:
    """Bytes; Linux's own mark, because ``getrusage`` begins a child at its parent's."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(
    engine: str, path: str, windows: Path, threads: int, clock: str, tokens: int, rounds: int
) -> dict[str, Any]:
    """Figures of one model.

    Args:
        engine: A key of ``ENGINES``.
        path: Folder or file.
        windows: ``.npy`` file of token numbers, ``[windows, 512]``; the first is the prompt too.
        threads: To compute with.
        clock: A key of :data:`CLOCKS`.
        tokens: To generate in a round.
        rounds: Of which the median counts.

    Returns:
        ``tokens_per_second`` behind a prompt of 16, ``prompt_tokens_per_second`` of one of 512, ``peak`` resident bytes
        after these (vLLM's with what it compiles), ``perplexity`` of the windows and ``greedy``, the tokens generated.
    """
    model: Any = ENGINES[engine](path, threads)
    ids = np.load(windows)
    seconds = CLOCKS[clock]
    model.prompt(ids[0, :LONG])  # compiles what is compiled at first use
    model.generate(ids[0, :16], 4)
    generated, prompts, greedy = [], [], []
    for _ in range(rounds):
        started = seconds()
        model.prompt(ids[0, :LONG])
        prompts.append(seconds() - started)
        started = seconds()
        model.generate(ids[0, :16], 1)
        first = seconds() - started
        started = seconds()
        greedy = model.generate(ids[0, :16], tokens)
        generated.append(seconds() - started - first)
    peak = peak_resident()
    losses = [model.loss(window) for window in ids]
    return {
        "tokens_per_second": (tokens - 1) / statistics.median(generated),
        "prompt_tokens_per_second": LONG / statistics.median(prompts),
        "peak": peak,
        "perplexity": math.exp(math.fsum(losses) / len(losses)),
        "greedy": greedy,
    }


class _Transformers:
    def __init__(self, path: str, threads: int) -> None:
        import json

        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        if "quantization_config" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8")):
            import usllm

            self._model: Any = usllm.load(path, dtype=torch.bfloat16)
        else:
            from transformers import AutoModelForCausalLM

            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model.eval()

    def _tensor(self, ids: Any) -> Any:
        return self._torch.tensor(np.asarray(ids)[None], dtype=self._torch.long)

    def prompt(self, ids: Any) -> None:
        with self._torch.no_grad():
            self._model(self._tensor(ids), use_cache=True, logits_to_keep=1)

    def generate(self, ids: Any, count: int) -> list[int]:
        given = self._tensor(ids)
        options = {"attention_mask": self._torch.ones_like(given), "do_sample": False, "pad_token_id": 0}
        found = self._model.generate(given, min_new_tokens=count, max_new_tokens=count, **options)
        return [int(number) for number in found[0, given.shape[1] :]]

    def loss(self, window: Any) -> float:
        """Mean cross-entropy of a window, from fp32 logits."""
        ids = self._tensor(window)
        with self._torch.no_grad():
            logits = self._model(ids, use_cache=False).logits[0, :-1].float()
        return float(self._torch.nn.functional.cross_entropy(logits, ids[0, 1:]).double())


class _Vllm:
    """In this very process, so that its memory and its computing are counted, with a cache for one sequence."""

    def __init__(self, path: str, threads: int) -> None:
        from vllm import LLM

        self._model: Any = LLM(
            path,
            dtype="bfloat16",
            max_model_len=LONG + 128,
            max_num_seqs=1,
            kv_cache_memory_bytes=1 << 26,
            enable_prefix_caching=False,  # a prompt is computed each time that it is measured
        )
        import torch

        if torch.get_num_threads() != threads:
            raise SystemExit(f"vLLM computes with {torch.get_num_threads()} threads, {threads} were asked for")

    def _asked(self, ids: Any, **options: Any) -> Any:
        from vllm import SamplingParams

        given = {"prompt_token_ids": [int(number) for number in ids]}
        options = {"temperature": 0.0, "ignore_eos": True, **options}
        return self._model.generate(given, SamplingParams(**options), use_tqdm=False)[0]

    def prompt(self, ids: Any) -> None:
        self._asked(ids, max_tokens=1)

    def generate(self, ids: Any, count: int) -> list[int]:
        return list(self._asked(ids, max_tokens=count).outputs[0].token_ids)

    def loss(self, window: Any) -> float:
        """Mean cross-entropy of a window."""
        listed = self._asked(window, max_tokens=1, prompt_logprobs=0).prompt_logprobs[1:]
        chosen = [of[int(number)].logprob for of, number in zip(listed, window[1:], strict=True)]
        return -math.fsum(chosen) / len(chosen)


class _LlamaCpp:
    def __init__(self, path: str, threads: int) -> None:
        from benchmarks.llama_cpp import LlamaCpp

        self._model = LlamaCpp(path, threads, context=LONG + 128)

    def prompt(self, ids: Any) -> None:
        self._model.forget()
        self._model.logits(ids, last=True)

    def generate(self, ids: Any, count: int) -> list[int]:
        return self._model.greedy(ids, count)

    def loss(self, window: Any) -> float:
        """Mean cross-entropy of a window."""
        return float(self._model.losses(window).mean())


ENGINES: dict[str, Callable[[str, int], Any]] = {"transformers": _Transformers, "vLLM": _Vllm, "llama.cpp": _LlamaCpp}
"""What runs a model, by its name in the table: made of a path and a number of threads."""
