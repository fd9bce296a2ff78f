"""A pass over a corpus takes no more memory at its end than at its beginning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.streaming import used, word_tokenizer, write_shards
from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_is_flat_over_a_pass_of_200_megabytes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    assert write_shards(tmp_path / "shards", kind, 200) > 1e8  # Parquet packs it
    source = SourceSpec(kind=kind, path=str(tmp_path / "shards" / "*"), streaming=True)
    data = TextDataModule(word_tokenizer(), source, context_length=512, batch_size=8, cache_dir=tmp_path / "cache")
    trainer: Any = SimpleNamespace(
        max_steps=1 << 30, accumulate_grad_batches=1, world_size=1, global_rank=0, global_step=0
    )
    data.trainer = trainer
    readings = []
    for number, _ in enumerate(data.train_dataloader()):
        if number % 50 == 0:
            readings.append(used(psutil.Process())[1])
            if data.stream_facts().get("data.train", {}).get("passes"):
                break
    steady = readings[len(readings) // 10 :]
    assert len(steady) > 50
    assert max(steady) - min(steady) < 100e6
