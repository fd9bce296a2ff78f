"""Packed models against the dense one: bytes on disk, peak memory and speed of generation, time of the export.

    python benchmarks/packed.py [--tokens 64] [--rates 0.5 1.0]                SmolLM2-135M
    python benchmarks/packed.py --shapes Llama-3.2-1B [--folder …]             random weights of these shapes

The models are packed without training (the sign sketch): sizes, memory and speed do not depend on it. Random models are
kept in the folder, where a second call finds them.
Every generation runs in a process of its own, so that peak resident memory is its own; the same process with a
model of 0.1 million weights is measured beside them. Tokens per second leave out loading and the prompt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.scaling import MODELS
from benchmarks.token_profile import profile, profile_line
from usllm.packed.attention import widen_attention_
from usllm.sketch import SketchConfig

if TYPE_CHECKING:
    from usllm.packed.export import ModelFiles
    from usllm.packed.source import PackingSource

PROMPT = "The list method append adds an item to the end of the list. The list method extend"
LAYOUTS = ("compact", "expanded", "decoded")
WIDENED = "attention as in packed models"
"""Of a dense model; by default it is transformers'."""
RESTS = {"16": (16, 16), "8": (8, 8), "4": (4, 4)}


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


def sign_sketch(rate: float) -> SketchConfig:
    """The sign sketch of the recipe."""
    return SketchConfig(
        bits_per_weight=rate,
        operator="mean",
        rows=1,
        state_bits=1,
        rounding="nearest",
        output_scale=True,
        allocation="waterfill",
        price_list="trained",
    )


def prepare_random(shapes: str, root: Path, rates: list[float]) -> dict[str, dict[str, Any]]:
    """The same variants of a model of random weights, as far as they are not there yet."""
    from benchmarks.block_by_block import write_model
    from usllm.compress import allocate_, compressed_layers, swap_linears_
    from usllm.models import ModelSpec
    from usllm.models.loading import load_config, load_dense, load_tokenizer
    from usllm.packed.export import ModelFiles
    from usllm.packed.source import from_model

    root = root / shapes
    root.mkdir(exist_ok=True)
    dense, sizes = root / "dense", prepare_tiny(root)
    if not (dense / "model.safetensors.index.json").is_file():
        write_model(shapes, dense)
    sizes["dense bf16"] = {"bytes": _weights(dense), "folder": dense}
    missing = [rate for rate in rates if not all((root / f"packed_{rate:g}_{rest}").is_dir() for rest in RESTS)]
    if missing:
        spec = ModelSpec(kind="folder", name=str(dense))
        model, files = load_dense(spec), ModelFiles(load_config(spec), load_tokenizer(spec))
        swap_linears_(model)
        draw = torch.Generator().manual_seed(0)
        found = compressed_layers(model)
        # A few inputs carry most of the energy, as in trained models.
        importance = {name: torch.rand(layer.in_features, generator=draw) ** 8 + 1e-3 for name, layer in found.items()}
        for rate in missing:
            for rest in RESTS:  # of a call that was stopped
                shutil.rmtree(root / f"packed_{rate:g}_{rest}", ignore_errors=True)
            allocate_(model, sign_sketch(rate), importance)
            export_all(from_model(model), files, root, rate)
    for rate in rates:
        for rest in RESTS:
            folder = root / f"packed_{rate:g}_{rest}"
            sizes[f"packed {rate:g} bpw, rest {rest} bit"] = {"bytes": _weights(folder), "folder": folder}
    return sizes


def prepare_tiny(root: Path) -> dict[str, dict[str, Any]]:
    """A packed model whose weights are nothing: what stands in a process before any model."""
    from usllm.compress import compress_
    from usllm.models import ModelSpec
    from usllm.models.loading import load_config, load_dense, load_tokenizer
    from usllm.packed.export import ModelFiles, export
    from usllm.packed.source import from_model

    folder, tiny = root / "tiny", ModelSpec(kind="random", name="llama")
    if not folder.is_dir():
        small = load_dense(tiny)
        compress_(small, SketchConfig(bits_per_weight=2.0, rows=1, group_size=64))
        export(from_model(small), ModelFiles(load_config(tiny), load_tokenizer(tiny)), folder)
    return {"tiny": {"folder": folder}}


def export_all(source: PackingSource, files: ModelFiles, root: Path, rate: float) -> dict[str, dict[str, Any]]:
    """A model with its rest in 16, 8 and 4 bits."""
    from usllm.packed.export import RestStorage, export

    sizes: dict[str, dict[str, Any]] = {}
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


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def prepare(root: Path, rates: list[float]) -> dict[str, dict[str, Any]]:
    """Pack all variants; what each takes on disk, and the seconds of the export itself."""
    from usllm.calibration.measure import measure_importance
    from usllm.compress import allocate_, swap_linears_
    from usllm.config import DataConfig
    from usllm.data import SourceSpec
    from usllm.models import ModelSpec
    from usllm.models.gguf_package import packaged_gguf
    from usllm.models.loading import load_config, load_dense, load_tokenizer
    from usllm.packed.export import ModelFiles
    from usllm.packed.source import from_model
    from usllm.runs.inputs import build_data

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
        sizes[name] = {"bytes": _weights(folder), "folder": folder}
        del copy
    gguf = packaged_gguf(str(spec.name))
    sizes[f"4-bit GGUF ({gguf.name})"] = {"bytes": gguf.stat().st_size}
    sizes |= prepare_tiny(root)
    data = build_data(DataConfig(train=SourceSpec(kind="pydoc"), context_length=256), tokenizer, 0, load_config(spec))
    swap_linears_(model)
    importance = measure_importance(model, data.calibration_batches(8), 8)
    for rate in rates:
        allocate_(model, sign_sketch(rate), importance)
        sizes |= export_all(from_model(model), files, root, rate)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--shapes", choices=list(MODELS), help="random weights of these shapes instead of SmolLM2")
    parser.add_argument("--folder", type=Path, help="where random models are kept; a temporary one by default")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; a sentence by default")
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
        measured = {name: _measure(str(place), dtype, layout, arguments) for name, place, dtype, layout in runs}
    reference, baseline = measured.get("dense bf16"), measured["a tiny model"]["peak"]
    for name, run in measured.items():
        speed = run["tokens_per_second"]
        ratio = speed / reference["tokens_per_second"] if reference else float("nan")
        above = (run["peak"] - baseline) / 1e6
        print(f"{name:52} peak {run['peak'] / 1e6:7.0f} MB, {above:7.0f} MB above the tiny model's", end="")
        print(f", {speed:6.2f} tokens/s, {ratio:.3f} of dense bf16", end="")
        print(f", prompt {run['prompt_tokens_per_second']:.0f} tokens/s")
        if run["profile"]:
            print(f"    {profile_line(run['profile'])}")


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
