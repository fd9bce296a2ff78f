"""Memory of a run that holds one block: a random model of a Llama's shapes goes from its files to a packed folder.

python benchmarks/block_by_block.py [--model Llama-3.2-1B] [--steps 5] [--folder …] [override …]

The model is written shard by shard, bf16, and `usllm-train block_by_block=true` runs in a process of its own. Printed
are the time and the peak of RssAnon + RssShmem over that process's life, read every 50 ms: pages of mapped files, which
are weights and streams, are the system's to take back, and are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.scaling import MODELS
from usllm.models.random_model import byte_tokenizer
from usllm.models.skeleton import skeleton

INTERVAL = 0.05
"""Seconds between two readings."""
_FIELDS = ("RssAnon", "RssShmem")


@dataclass(frozen=True)
class Peak:
    """The largest reading of a process.

    Attributes:
        status: That it ended with.
        bytes: RssAnon + RssShmem.
        seconds: That it took.
        readings: Number of them.
    """

    status: int
    bytes: int
    seconds: float
    readings: int


def write_model(name: str, folder: Path) -> None:
    """A random model of a Llama's shapes with a tokenizer of bytes; one shard is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**MODELS[name], dtype="bfloat16", bos_token_id=256, eos_token_id=256)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_shards(config)):
        tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each block, and of what stands around the blocks; tied ones once."""
    seen: set[int] = set()
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in skeleton(config).named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        parts = name.split(".")
        shards.setdefault(".".join(parts[:3]) if "layers" in parts else name, {})[name] = tuple(parameter.shape)
    return iter(shards.values())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Row by row of a few thousand: the whole in fp32 would be twice the tensor.
    rows = [torch.randn((len(part), *shape[1:]), generator=generator) for part in torch.arange(shape[0]).split(4096)]
    return torch.cat([(0.02 * part).to(torch.bfloat16) for part in rows])


def peak_of(command: list[str], cwd: Path) -> Peak:
    """Run a command and read its memory until it ends."""
    began, most, readings = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, cwd=cwd)
    while (status := process.poll()) is None:
        most, readings = max(most, held_by(process.pid)), readings + 1
        time.sleep(INTERVAL)
    return Peak(status, most, time.perf_counter() - began, readings)


def held_by(pid: int) -> int:
    """RssAnon + RssShmem of a process in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(1024 * int(found[field].split()[0]) for field in _FIELDS if field in found)


def arguments(model: Path, text: Path, run_dir: Path, steps: int) -> list[str]:
    """Overrides of a short run: few sequences, every part of it."""
    return [
        *(f"model={model}", "data=text", f"data.train.path={text}", f"run_dir={run_dir}", "name=block_by_block"),
        *("block_by_block=true", "trainer.max_steps=0", "stages=[default,reconstruct]", "sketch=sign"),
        *("allocation.layer_budget=importance", "data.context_length=256", "data.num_proc=1", "reuse_statistics=false"),
        *("stages.calibrate.sequences=4", "stages.reconstruct.sequences=16", "stages.reconstruct.batch_size=4"),
        *(f"stages.reconstruct.steps={steps}", "stages.reconstruct.warmup_steps=1"),
        *("stages.reconstruct.calibration_sequences=8", "evaluation.windows=[256]", "evaluation.max_windows=4"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3.2-1B", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "block_by_block", help="on a disk, not in memory")
    given, overrides = parser.parse_known_args()
    folder = given.folder.absolute()
    model, text = folder / given.model, folder / "text.txt"
    if not (model / "model.safetensors.index.json").is_file():
        write_model(given.model, model)
    text.write_text("\n\n".join(f"the cat sat on mat {n} while {n * n} dogs ran over green hills" for n in range(400)))
    typed = [*arguments(model, text, folder / "run", given.steps), *overrides]
    found = peak_of([sys.executable, "-m", "usllm.cli.train", *typed], folder)
    print(f"usllm-train {' '.join(typed)}")
    print(
        f"{given.model}, {given.steps} steps a block: peak of RssAnon + RssShmem {found.bytes / 1e9:.2f} GB "
        f"({found.readings} readings), {found.seconds / 60:.1f} minutes, status {found.status}"
    )
    raise SystemExit(found.status)


if __name__ == "__main__":
    main()
