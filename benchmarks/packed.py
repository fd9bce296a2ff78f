"""Packed SmolLM2-135M against the dense model: bytes on disk, peak memory and speed of generation, time of the export.

    python benchmarks/packed.py [--tokens 64] [--rates 0.5 1.0]

The models are packed without training (the sign sketch): sizes, memory and speed do not depend on it.
Every generation runs in a process of its own, so that peak resident memory is its own; the same process with a
model of 0.1 million weights is measured beside them. Tokens per second leave out loading and the prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = "The list method append adds an item to the end of the list. The list method extend"
LAYOUTS = ("compact", "expanded", "decoded")
RESTS = {"16": (16, 16), "8": (8, 8), "4": (4, 4)}


def generate(folder: str, dtype: str, layout: str, tokens: int) -> dict[str, float]:
    """Load, generate greedily, and report tokens a second and peak resident bytes of this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import usllm

    kind = getattr(torch, dtype)
    packed = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    if packed:
        model = usllm.load(folder, dtype=kind, layout=layout)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model.generate(ids, max_new_tokens=1, **options)  # compiles what is compiled at first use
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    prompt = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
    seconds = time.perf_counter() - started - prompt
    return {"tokens_per_second": (tokens - 1) / seconds, "peak": peak_resident()}


def peak_resident() -> int:
    """Bytes; Linux's own mark, because ``getrusage`` begins a child at its parent's."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def prepare(root: Path, rates: list[float]) -> dict[str, dict[str, Any]]:
    """Pack all variants; what each takes on disk, and the seconds of the export itself."""
    from usllm.calibration.measure import measure_importance
    from usllm.compress import allocate_, compress_, swap_linears_
    from usllm.config import DataConfig
    from usllm.data import SourceSpec
    from usllm.models import ModelSpec
    from usllm.models.gguf_package import packaged_gguf
    from usllm.models.loading import load_config, load_dense, load_tokenizer
    from usllm.packed.export import ModelFiles, RestStorage, export
    from usllm.packed.source import from_model
    from usllm.runs.inputs import build_data
    from usllm.sketch import SketchConfig

    spec = ModelSpec()
    model = load_dense(spec)
    tokenizer = load_tokenizer(spec)
    files = ModelFiles(load_config(spec), tokenizer)
    sizes: dict[str, dict[str, Any]] = {}
    for name, dtype in (("dense fp32", torch.float32), ("dense bf16", torch.bfloat16)):
        folder = root / name.replace(" ", "_")
        copy: Any = load_dense(spec)
        copy.to(dtype)
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sizes[name] = {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "folder": folder}
        del copy
    gguf = packaged_gguf(str(spec.name))
    sizes[f"4-bit GGUF ({gguf.name})"] = {"bytes": gguf.stat().st_size}
    tiny = ModelSpec(kind="random", name="llama")
    small = load_dense(tiny)
    compress_(small, SketchConfig(bits_per_weight=2.0, rows=1, group_size=64))
    export(from_model(small), ModelFiles(load_config(tiny), load_tokenizer(tiny)), root / "tiny")
    sizes["tiny"] = {"folder": root / "tiny"}
    data = build_data(DataConfig(train=SourceSpec(kind="pydoc"), context_length=256), tokenizer, 0, load_config(spec))
    swap_linears_(model)
    importance = measure_importance(model, data.calibration_batches(8), 8)
    for rate in rates:
        sketch = SketchConfig(
            bits_per_weight=rate,
            operator="mean",
            rows=1,
            state_bits=1,
            rounding="nearest",
            output_scale=True,
            allocation="waterfill",
            price_list="trained",
        )
        allocate_(model, sketch, importance)
        source = from_model(model)
        for rest, (embeddings, linears) in RESTS.items():
            folder = root / f"packed_{rate:g}_{rest}"
            started = time.perf_counter()
            inspection = export(source, files, folder, rest=RestStorage("bfloat16", embeddings, linears))
            sizes[f"packed {rate:g} bpw, rest {rest} bit"] = {
                "bytes": inspection.weight_bytes,
                "sketched": inspection.sketched_bytes,
                "model_bpw": inspection.model_bits_per_weight,
                "export_seconds": time.perf_counter() - started,
                "folder": folder,
            }
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--generate", nargs=3, metavar=("FOLDER", "DTYPE", "LAYOUT"), help="measure one, print JSON")
    arguments = parser.parse_args()
    if arguments.generate:
        folder, dtype, layout = arguments.generate
        print(json.dumps(generate(folder, dtype, layout, arguments.tokens)))
        return
    from usllm.system.machine import machine, machine_line

    print(machine_line(machine()))
    with tempfile.TemporaryDirectory() as folder:
        sizes = prepare(Path(folder), arguments.rates)
        dense = sizes["dense bf16"]["bytes"]
        for name, size in sizes.items():
            if "bytes" not in size:
                continue
            export = f", exported in {size['export_seconds']:.1f} s" if "export_seconds" in size else ""
            model = f", {size['model_bpw']:.2f} bits per parameter" if "model_bpw" in size else ""
            print(f"{name:44} {size['bytes']:>12,} bytes, {size['bytes'] / dense:.3f} of dense bf16{model}{export}")
        runs = [("a tiny model", sizes["tiny"]["folder"], "bf16", "auto")]
        runs += [(name, sizes[name]["folder"], name.split()[1], "auto") for name in ("dense fp32", "dense bf16")]
        for name, size in sizes.items():
            if name.startswith("packed"):
                runs += [(f"{name}, {layout}", size["folder"], "bf16", layout) for layout in LAYOUTS]
        measured = {name: _measure(str(place), dtype, layout, arguments.tokens) for name, place, dtype, layout in runs}
    reference, baseline = measured["dense bf16"], measured["a tiny model"]["peak"]
    for name, run in measured.items():
        speed = run["tokens_per_second"]
        ratio = speed / reference["tokens_per_second"]
        above = (run["peak"] - baseline) / 1e6
        print(
            f"{name:52} peak {run['peak'] / 1e6:7.0f} MB, {above:7.0f} MB above the tiny model's"
            f", {speed:6.2f} tokens/s, {ratio:.3f} of dense bf16"
        )


def _measure(folder: str, dtype: str, layout: str, tokens: int) -> dict[str, float]:
    names = {"bf16": "bfloat16", "fp32": "float32"}
    command = [
        sys.executable,
        __file__,
        "--tokens",
        str(tokens),
        "--generate",
        folder,
        names.get(dtype, dtype),
        layout,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
