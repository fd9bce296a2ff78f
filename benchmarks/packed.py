"""Packed models against the dense one: bytes on disk, peak memory and speed of generation, time of the export.

    python benchmarks/packed.py [--tokens 64] [--rates 0.5 1.0]                SmolLM2-135M
    python benchmarks/packed.py --shapes Llama-3.2-1B [--folder …]             random weights of these shapes

The models are packed without training (the sign sketch): sizes, memory and speed do not depend on it. Random models are
kept in the folder, where a second call finds them.
Every generation runs in a process of its own, so that peak resident memory is its own; the same process with a
model of 0.1 million weights is measured beside them. Tokens per second leave out loading and the prompt. With
``--rounds`` models take turns, so that what else the machine does meets all of them, and medians are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.packed_models import prepare, prepare_random
from benchmarks.scaling import MODELS
from benchmarks.token_profile import profile, profile_line
from usllm.packed.attention import widen_attention_

PROMPT = "The list method append adds an item to the end of the list. The list method extend"
LAYOUTS = ("compact", "expanded", "decoded")
WIDENED = "attention as in packed models"
"""Of a dense model; by default it is transformers'."""


def generate(folder: str, dtype: str, layout: str, tokens: int, batch: int, length: int | None) -> dict[str, Any]:
    """Load and generate greedily: tokens a second, peak resident bytes of this process, and the profile of a token.

    Args:
        folder: Of the model.
        dtype: That is computed in.
        layout: Of a packed model.
        tokens: To generate behind the prompt.
        batch: Sequences at once.
        length: Tokens of the prompt, which is repeated up to there; as it is by default.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import usllm

    kind = getattr(torch, dtype)
    packed = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    if packed:
        model = usllm.load(folder, dtype=kind, layout=layout)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
        if layout == WIDENED:
            widen_attention_(model)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    length = length or ids.shape[1]
    ids = ids.repeat(batch, -(-length // ids.shape[1]))[:, :length]
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model.generate(ids, max_new_tokens=1, **options)  # compiles what is compiled at first use
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    prompt = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
    seconds = time.perf_counter() - started - prompt
    peak = peak_resident()
    parts = profile(model, {"inputs": ids, **options}, tokens) if batch == 1 else None
    return {
        "tokens_per_second": batch * (tokens - 1) / seconds,
        "prompt_tokens_per_second": batch * length / prompt,
        "peak": peak,
        "profile": parts,
    }


def peak_resident() -> int:
    """Bytes; Linux's own mark, because ``getrusage`` begins a child at its parent's."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--shapes", choices=list(MODELS), help="random weights of these shapes instead of SmolLM2")
    parser.add_argument("--folder", type=Path, help="where random models are kept; a temporary one by default")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; a sentence by default")
    parser.add_argument("--rounds", type=int, default=1, help="how often each model is measured")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of what is measured")
    parser.add_argument("--generate", nargs=3, metavar=("FOLDER", "DTYPE", "LAYOUT"), help="measure one, print JSON")
    arguments = parser.parse_args()
    if arguments.generate:
        folder, dtype, layout = arguments.generate
        found = generate(folder, dtype, layout, arguments.tokens, arguments.batch, arguments.prompt)
        print(json.dumps(found))
        return
    from usllm.system.machine import machine, machine_line

    print(machine_line(machine()))
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        shapes = arguments.shapes
        sizes = prepare_random(shapes, root, arguments.rates) if shapes else prepare(root, arguments.rates)
        dense = sizes["dense bf16"]["bytes"]
        for name, size in sizes.items():
            if "bytes" not in size:
                continue
            export = f", exported in {size['export_seconds']:.1f} s" if "export_seconds" in size else ""
            model = f", {size['model_bpw']:.2f} bits per parameter" if "model_bpw" in size else ""
            print(f"{name:44} {size['bytes']:>12,} bytes, {size['bytes'] / dense:.3f} of dense bf16{model}{export}")
        runs = [("a tiny model", sizes["tiny"]["folder"], "bf16", "auto")]
        runs += [(name, sizes[name]["folder"], name.split()[1], "auto") for name in sizes if name.startswith("dense")]
        runs.append((f"dense bf16, {WIDENED}", sizes["dense bf16"]["folder"], "bf16", WIDENED))
        for name, size in sizes.items():
            if name.startswith("packed"):
                runs += [(f"{name}, {layout}", size["folder"], "bf16", layout) for layout in arguments.layouts]
        runs = [run for run in runs if "tiny" in run[0] or any(part in run[0] for part in arguments.only)]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in runs}
        for _ in range(arguments.rounds):
            for name, place, dtype, layout in runs:
                rounds[name].append(_measure(str(place), dtype, layout, arguments))
    measured = {name: _median(found) for name, found in rounds.items()}
    reference, baseline = measured.get("dense bf16"), measured["a tiny model"]["peak"]
    for name, run in measured.items():
        speed = run["tokens_per_second"]
        ratio = speed / reference["tokens_per_second"] if reference else float("nan")
        above = (run["peak"] - baseline) / 1e6
        print(f"{name:52} peak {run['peak'] / 1e6:7.0f} MB, {above:7.0f} MB above the tiny model's", end="")
        print(f", {speed:6.2f} tokens/s, {ratio:.3f} of dense bf16", end="")
        print(f", prompt {run['prompt_tokens_per_second']:.0f} tokens/s", end="")
        every = ", ".join(f"{one['tokens_per_second']:.2f}" for one in rounds[name])
        print(f"; rounds: {every}" if arguments.rounds > 1 else "")
        if run["profile"]:
            print(f"    {profile_line(run['profile'])}")


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure; the profile is that of the last round."""
    figures = [key for key in found[-1] if key != "profile"]
    return found[-1] | {key: statistics.median(one[key] for one in found) for key in figures}


def _measure(folder: str, dtype: str, layout: str, arguments: argparse.Namespace) -> dict[str, Any]:
    names = {"bf16": "bfloat16", "fp32": "float32"}
    command = [
        sys.executable,
        __file__,
        *("--tokens", str(arguments.tokens), "--batch", str(arguments.batch)),
        *(("--prompt", str(arguments.prompt)) if arguments.prompt else ()),
        "--generate",
        folder,
        names.get(dtype, dtype),
        layout,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
