"""The benchmark of one block writes a model that loads, and reads the memory that it says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import block_by_block, scaling
from usllm.models import ModelSpec
from usllm.models.loading import load_dense
from usllm.models.stored_weights import open_weights

SMALL = {
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("tied", [False, True])
def test_model_is_written_in_shards_and_loads(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_by_block.MODELS, "small", {**SMALL, "tie_word_embeddings": tied})
    block_by_block.write_model("small", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == (4 if tied else 5)  # blocks, embedding, norm, and a head
    spec = ModelSpec(kind="folder", name=str(tmp_path))
    weights, model = open_weights(spec), load_dense(spec)
    assert all(torch.equal(weights[name].float(), value) for name, value in model.state_dict().items())


def test_memory_of_a_process_is_read_until_it_ends(tmp_path: Path) -> None:
    assert block_by_block.held_by(os.getpid()) > 1 << 20
    found = block_by_block.peak_of([sys.executable, "-c", "x = b'1' * (1 << 28); raise SystemExit(3)"], tmp_path)
    assert found.status == 3 and found.readings > 0
    assert block_by_block.held_by(1 << 30) == 0  # no such process


def test_a_block_is_counted_as_it_is_held() -> None:
    found = scaling.one_block(scaling.build(scaling.MODELS["Llama-3.2-1B"]))
    assert found.weights * found.blocks < found.parameters
    memory = found.memory()
    assert memory["**sum**"] == sum(value for name, value in memory.items() if name != "**sum**")
    assert memory["AdamW (2 x fp32)"] == 8 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048)
