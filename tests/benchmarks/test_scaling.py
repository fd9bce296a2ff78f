"""The tables of docs/scaling.md are what the script counts, and the script counts what is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scaling, scaling_check, scaling_counts
from usllm.compress import compress_, compressed_layers
from usllm.models.random_model import random_model


def test_page_holds_what_the_script_counts() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.page_with(page, "\n".join(scaling.tables())) == page, "run python benchmarks/scaling.py --write"


def test_states_are_counted_as_the_buffers_of_a_compressed_model() -> None:
    model = random_model("llama")
    compress_(model, scaling.SKETCH)
    held = sum(buffer.nbytes for layer in compressed_layers(model).values() for buffer in layer.buffers())
    winners = sum(2 * layer.plan.num_states for layer in compressed_layers(model).values() if layer.plan is not None)
    one = scaling.Setup("one", 1, sharded=False, checkpointing=False)
    assert scaling.state_bytes(model, one) == held + winners


@pytest.mark.parametrize(("rows", "ranks", "elements"), [(8, 1, 80), (8, 8, 10), (9, 8, 20), (3, 8, 10)])
def test_largest_shard_is_the_first_run_of_rows(rows: int, ranks: int, elements: int) -> None:
    weight = torch.empty(rows, 10)
    assert scaling_counts.shard(weight, ranks) == elements == weight.chunk(ranks)[0].numel()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_small_models_hold_what_is_counted_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    status = scaling_check.check()
    assert status == 0, capsys.readouterr().out
