"""Results that a dense model and a text alone decide, computed by the first run that wants them and kept by content.

A kept result equals a fresh one bit for bit: its key holds everything that the arithmetic depends on, the versions of
the libraries, the processor and the number of threads included. Jobs that want the same result at the same time wait
for the one that computes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usllm.system.cache import cache_root, published
from usllm.system.files import write_tensors, write_text
from usllm.system.machine import cpu_name

_FORMAT = 1  # part of every key: raise it when the same input is to give other results


def arithmetic(device: torch.device, autocast: torch.dtype | None) -> dict[str, Any]:
    """What the last bits of a result depend on besides its input."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}",
        "threads": torch.get_num_threads(),
        "autocast": str(autocast),
        "matmul": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG")},
    }


def tokens_digest(batches: Iterable[Tensor]) -> str:
    """Fingerprint of integer tensors, their shapes and order included."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch.detach().cpu().to(torch.int64).contiguous()
        digest.update(f"{list(ids.shape)}".encode())
        digest.update(ids.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept_tensors(
    kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]], root: Path | None = None
) -> dict[str, Tensor]:
    """Named tensors, on the CPU when they were kept.

    Args:
        kind: name of the folder under the cache.
        key: plain Python; everything that the result depends on.
        compute: makes them.
        root: folder that they are kept in, instead of the cache.
    """
    from safetensors.torch import load_file

    fresh: dict[str, Tensor] = {}

    def build(folder: Path) -> None:
        fresh.update(compute())
        write_tensors(
            folder / "tensors.safetensors", {name: tensor.cpu().contiguous() for name, tensor in fresh.items()}
        )

    folder = _entry(kind, key, build, root)
    return fresh or load_file(folder / "tensors.safetensors")


def kept_rows(kind: str, key: Mapping[str, Any], compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of plain Python; arguments as for :func:`kept_tensors`."""

    def build(folder: Path) -> None:
        write_text(folder / "rows.json", json.dumps(compute()))

    folder = _entry(kind, key, build)
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return rows


def _entry(kind: str, key: Mapping[str, Any], build: Callable[[Path], None], root: Path | None = None) -> Path:
    content = json.dumps({"format": _FORMAT, **key}, sort_keys=True)

    def described(folder: Path) -> None:
        build(folder)
        write_text(folder / "key.json", content)

    return published((root or cache_root()) / kind / hashlib.sha256(content.encode()).hexdigest()[:32], described)
