"""vLLM's answers are those of ``usllm.load``: the same tokens in fp32, nearly all of them in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engines import METHODS, WRITES, answered, needs_vllm, tokens_of
from torch import Tensor

import usllm

pytestmark = [needs_vllm, pytest.mark.timeout(3600)]

TOKENS = 32


class Model(NamedTuple):
    """A folder, prompts for it, and what ``usllm.load`` answers in fp32."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def model_of(folder_of: Callable[[str], Path]) -> Callable[[str], Model]:
    """The model of a method."""

    @lru_cache
    def made(method: str) -> Model:
        folder = folder_of(method)
        prompts = tokens_of(folder)
        model = usllm.load(folder, dtype=torch.float32, layout="decoded")  # the same bits as compact layers, sooner
        whole = [
            model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)[0].tolist()  # type: ignore[operator]
            for ids in prompts
        ]
        return Model(folder, prompts, [text[len(ids) :] for text, ids in zip(whole, prompts, strict=True)])

    return made


@pytest.mark.parametrize("method", METHODS)
def test_fp32_answers_are_those_of_load(model_of: Callable[[str], Model], method: str, tmp_path: Path) -> None:
    model = model_of(method)
    engine = {"model": str(model.folder), "dtype": "float32", "enforce_eager": True}
    request = {"engine": engine, "prompts": model.prompts, "sampling": {"max_tokens": TOKENS}}
    assert len(model.prompts) == 8 and max(map(len, model.answers)) == TOKENS
    assert [answer["tokens"] for answer in answered(request, tmp_path)] == model.answers


@torch.no_grad()
def test_bf16_choices_are_those_of_load(model_of: Callable[[str], Model], tmp_path: Path) -> None:
    """Compiled, and teacher-forced: at each place of a text both are asked for the next token."""
    model = model_of(WRITES)
    texts = [ids + answer for ids, answer in zip(model.prompts, model.answers, strict=True)]
    engine = {"model": str(model.folder), "dtype": "bfloat16"}
    sampling = {"max_tokens": 1, "prompt_logprobs": 1}
    answers = answered({"engine": engine, "prompts": texts, "sampling": sampling}, tmp_path)
    ours = usllm.load(model.folder, dtype=torch.bfloat16)
    equal, gaps = [], []
    for text, answer in zip(texts, answers, strict=True):
        logits: Tensor = ours(torch.tensor([text])).logits[0, :-1].float()
        theirs = torch.tensor(answer["choices"])
        same = logits.argmax(-1) == theirs
        gap = logits.amax(-1) - logits.gather(1, theirs[:, None])[:, 0]
        equal.append(same)
        gaps += [f"{value:.3f}" for value in gap[~same].tolist()]
    share = torch.cat(equal).float().mean().item()
    print(f"\n{share:.2%} of {len(torch.cat(equal))} choices are equal; logit gaps of the others: {', '.join(gaps)}")
    assert share >= 0.99
