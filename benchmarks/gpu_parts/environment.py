"""Which card, driver, versions and sources the other results are of."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.results import OK, Refused
from benchmarks.gpu_parts.session import Session

PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy", "pytest", "hypothesis")
DRY_RUN = "CPU (dry run)"
_ROOT = Path(__file__).parents[2]


def run(session: Session) -> None:
    """One line; it is written by every call, as each may be of other sources."""
    session.begin("machine")
    try:
        found = _machine(session.dry_run)
        for line in session.results.lines():
            if line["part"] == session.part and line["status"] == OK and line["card"] != found["card"]:
                raise Refused(
                    f"--out: the results there are of {line['card']}, this is {found['card']}: choose another folder"
                )
    except Exception as error:
        session.fail("machine", error)
        return
    session.write("machine", OK, **found)


def _machine(dry_run: bool) -> dict[str, Any]:
    missing = [package for package in PACKAGES if _version(package) is None]
    if missing:
        raise Refused(f"these packages are missing: pip install {' '.join(missing)}")
    import torch

    found: dict[str, Any] = {
        "card": DRY_RUN,
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "sources": sources_digest(),
        **_commit(),
    }
    if dry_run:
        return found
    if not torch.cuda.is_available():
        raise Refused("there is no CUDA card that torch can use: run on a CUDA machine, or pass --dry-run")
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return found | {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def sources_digest() -> str:
    """Fingerprint of the Python files that results depend on; a copy of the repository may come without its history."""
    digest = hashlib.sha256()
    for folder in ("usllm", "kernels", "benchmarks", "tests/kernels"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> dict[str, Any]:
    commit = _printed("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if not commit:
        return {}
    return {"commit": commit, "changed": bool(_printed("git", "-C", str(_ROOT), "status", "--porcelain"))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
