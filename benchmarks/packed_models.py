"""The variants of a model that ``packed.py`` measures: dense, and the sign sketch with its rest in 16, 8 and 4 bits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usllm.sketch import SketchConfig

if TYPE_CHECKING:
    from usllm.packed.export import ModelFiles
    from usllm.packed.source import PackingSource

RESTS = {"16": (16, 16), "8": (8, 8), "4": (4, 4)}
"""What is not compressed: bits of embeddings and head, and of other linear layers."""


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
    """All variants of a model of random weights, as far as they are not there yet; what each takes on disk."""
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
