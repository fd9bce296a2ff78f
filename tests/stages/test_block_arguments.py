"""Blocks run one by one on conversations that lie side by side, as they run within the whole model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from usllm.data.batches import in_parts
from usllm.models.random_model import random_model
from usllm.stages.block_arguments import same_for_all
from usllm.stages.blocks import capture, decoder_blocks, output_of, run_block

LENGTHS = ([5, 7], [1, 4, 7], [12], [3, 3, 3, 3])
IDS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
FAMILIES = ("llama", "qwen3", "gemma3_text")


def model_of(family: str) -> PreTrainedModel:
    model = random_model(family).eval()
    model.config.sliding_window = 4
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streams_are_those_of_the_whole_model(family: str) -> None:
    model = model_of(family)
    blocks = decoder_blocks(model)
    seen: list[torch.Tensor] = []
    handle = blocks[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)
    handle.remove()
    batch = {"input_ids": IDS, "position_ids": POSITIONS}
    stream, arguments = capture(model, blocks, in_parts(batch, 2), torch.device("cpu"))
    for block, given in zip(blocks, arguments, strict=True):
        stream = run_block(block, stream, given, 2, nullcontext)
    torch.testing.assert_close(stream, seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_conversation_comes_out_as_if_it_were_alone(family: str) -> None:
    model = model_of(family)
    together = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    for row, lengths in enumerate(LENGTHS):
        parts = zip(IDS[row].split(lengths), together[row].split(lengths), strict=True)
        for ids, logits in parts:
            alone = model(input_ids=ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_any_sequences_get_arguments_of_their_own() -> None:
    model = model_of("llama")
    blocks = decoder_blocks(model)
    batches = in_parts({"input_ids": IDS, "position_ids": POSITIONS}, 4)
    stream, arguments = capture(model, blocks, batches, torch.device("cpu"))
    whole = output_of(blocks[0], stream, arguments[0](slice(None)))
    some = torch.tensor([3, 0, 1])
    found = output_of(blocks[0], stream[some], arguments[0](some))
    torch.testing.assert_close(found, whole[some])
    torch.testing.assert_close(output_of(blocks[0], stream[2:3], arguments[0](slice(2, 3))), whole[2:3])
    assert not any("forward" in vars(block) for block in blocks)


def test_arguments_of_plain_text_are_cut_to_the_sequences_that_are_asked_for() -> None:
    given: dict[str, Any] = {"mask": torch.zeros(4, 1, 2, 2), "angles": torch.zeros(1, 2, 8), "cache": None}
    arguments = same_for_all(given, 4)
    for sequences, count in ((slice(0, 4), 4), (slice(None), 4), (slice(1, 3), 2), (torch.tensor([2, 0, 1]), 3)):
        found = arguments(sequences)
        assert len(found["mask"]) == count
        assert found["angles"] is given["angles"] and found["cache"] is None
