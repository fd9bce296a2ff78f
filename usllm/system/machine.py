"""What the numbers of a report were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("usllm", "torch", "transformers", "lightning", "datasets")


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """Processor, cores, GPU, operating system, Python and library versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": gpus,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_line(info: dict[str, object]) -> str:
    """One line for people, such as ``AMD EPYC, 2 cores, torch 2.13.0+cpu``."""
    gpus = info.get("gpus")
    devices = f", {', '.join(gpus)}" if isinstance(gpus, list) and gpus else ""
    versions = info.get("versions")
    torch_version = versions.get("torch", "?") if isinstance(versions, dict) else "?"
    return f"{info.get('cpu')}, {info.get('cores')} cores{devices}, Python {info.get('python')}, torch {torch_version}"


def fast_bf16(accelerator: str) -> bool:
    """Whether the machine multiplies bf16 matrices in hardware, so that ``bf16-mixed`` is worth its rounding."""
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator in ("cpu", "auto"):
        features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 may lack it: fp32
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def choose_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """Dtype of ``torch.autocast`` for ``evaluation.precision`` on a device; ``None`` computes in the weights' dtype."""
    fast = precision == "auto" and fast_bf16("gpu" if device.type == "cuda" else device.type)
    return torch.bfloat16 if fast or precision == "bf16" else None


def choose_precision(precision: str, accelerator: str) -> str:
    """Resolve ``auto``; anything else is returned as it is."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if fast_bf16(accelerator) else "32-true"
