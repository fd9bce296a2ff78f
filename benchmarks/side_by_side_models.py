"""The models that are compared, as folders and files: ours from checkpoints, llama.cpp's from the dense model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from usllm.models import ModelSpec
from usllm.models.gguf_package import packaged_gguf
from usllm.models.gguf_plan import plan_gguf
from usllm.models.gguf_writer import write_gguf
from usllm.models.loading import load_config, load_dense, load_generation_config, load_tokenizer

RESTS = {"bf16": (16, 16), "8 bits": (8, 8), "4 bits": (4, 4)}
"""What is not compressed: bits of embeddings and head, and of other linear layers."""
GGUF_KINDS = ("BF16", "Q8_0", "Q4_0", "Q2_0")
"""Of the dense model; the last is llama.cpp's own, of 2.25 bits, and leaves embedding and head in 8."""


@dataclass(frozen=True)
class Model:
    """One row of the comparison.

    Attributes:
        name: In the table.
        engine: What runs it, a key of ``side_by_side_measure.ENGINES``.
        path: Folder or file.
        make: Makes it there, where it is not there yet.
        ours: Whether it is compressed by this package.
    """

    name: str
    engine: str
    path: Path
    make: Callable[[Path], None]
    ours: bool = False

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.engine}: {self.name}"

    def made(self) -> int:
        """Make it if need be; bytes of the weights."""
        if not self.path.exists():
            self.make(self.path)
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def models(root: Path, runs: Sequence[str]) -> list[Model]:
    """All rows, in their order; none is made yet.

    Args:
        root: Folder for it all: about 160 MB for each run and 1 GB for the dense model.
        runs: Run folders of SmolLM2 with a checkpoint.
    """
    found = [Model("dense, bf16", "transformers", root / "dense-bf16", _dense)]
    for run in runs:
        called = _called(run)
        for rest, bits in RESTS.items():
            out = root / f"{Path(run).name}-{rest.replace(' ', '')}"
            found.append(Model(f"{called}, rest {rest}", "transformers", out, partial(_packed, run, bits), ours=True))
    found += [replace(model, engine="vLLM") for model in found]
    shipped = packaged_gguf(str(ModelSpec().name))
    found.append(Model("Q4_1, the file on PyPI", "llama.cpp", shipped, _refuse))
    for kind in GGUF_KINDS:
        path = root / f"dense-{kind}.gguf"
        found.append(Model(f"{kind} of the dense model", "llama.cpp", path, partial(_gguf, kind)))
    return found


def _called(run: str) -> str:
    """What the method and rate of a run are called in the table."""
    from usllm.runs.saved_run import find_checkpoint, stored_config
    from usllm.training import load_checkpoint

    checkpoint = find_checkpoint(run)
    sketch = stored_config(load_checkpoint(checkpoint), checkpoint)["sketch"]
    method = sketch.get("method", "sketch")
    name = "sign sketch" if method == "sketch" and sketch.get("state_bits") == 1 else method
    return f"{name} at {sketch['bits_per_weight']:g} bits"


def _packed(run: str, bits: tuple[int, int], out: Path) -> None:
    options = [f"rest.embeddings={bits[0]}", f"rest.linears={bits[1]}"]
    subprocess.run([sys.executable, "-m", "usllm.cli.export", f"ckpt={run}", f"out={out}", *options], check=True)


def _dense(out: Path) -> None:
    import torch

    model: Any = load_dense(ModelSpec())
    model.to(torch.bfloat16).save_pretrained(out)
    load_tokenizer(ModelSpec()).save_pretrained(out)


def _gguf(kind: str, out: Path) -> None:
    spec = ModelSpec()
    described = load_config(spec), load_tokenizer(spec), load_generation_config(spec)
    weights = load_dense(spec).state_dict()
    if kind in ("Q2_0",):
        from benchmarks.llama_cpp_types import write_in_blocks

        write_in_blocks(plan_gguf(*described, kind="Q4_0"), weights.__getitem__, out, kind.lower())
    else:
        write_gguf(plan_gguf(*described, kind=kind), weights.__getitem__, out)


def _refuse(path: Path) -> None:
    raise FileNotFoundError(path)
