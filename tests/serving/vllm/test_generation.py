"""vLLM's answers are those of ``usllm.load``: the same tokens in fp32, nearly all of them in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engines import METHODS, WRITES, answered, needs_vllm, tokens_of

import usllm
from usllm.packed.linear import packed_layers

pytestmark = [needs_vllm, pytest.mark.timeout(3600)]

TOKENS = 32
PASSAGES, PASSAGE = 56, 12
"""Beginnings of texts beside the prompts, and tokens of each: of so few choices as the prompts' one is a third of a
percent."""
LEAST_SHARE = 0.99
"""Of choices behind the prompts, which is the aim. It is more than rounding leaves: 98.98 % of 295 are equal, and the
*dense* model agrees between vLLM and transformers in 98.47 % of 2,945 (2026-11-27; docs/log.md)."""
LEAST_SHARE_EXPANDED = 0.97
"""The same of expanded layers, where no aim was set: 97.63 % and, of LittleBit, 98.01 %."""
LEAST_SHARE_OF_ALL = 0.965
"""Of choices in all texts: 97.60 %, of LittleBit too; a standard deviation is a third of a percent."""
MOST_STEPS = 6
"""Numbers of bf16 that a choice may be below the largest logit in all texts, but at the first two tokens of one, which
have large activations: there it is twice what bf16 moves logits by. Measured: 4, and 10 at the first two."""
LAYOUTS = [(WRITES, "auto", "compact"), (WRITES, "expanded", "expanded"), ("littlebit", "auto", "expanded")]
"""Methods, what is asked for, and what is given: 4 bits are too many to be expanded unasked."""


class Model(NamedTuple):
    """A folder, prompts for it, what ``usllm.load`` answers in fp32, and how it goes on after passages."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    passages: list[list[int]]

    @property
    def texts(self) -> list[list[int]]:
        """All that was asked and answered."""
        return [ids + answer for ids, answer in zip(self.prompts, self.answers, strict=True)] + self.passages


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
        begun = torch.tensor([ids[:PASSAGE] for ids in tokens_of(folder, passages())])
        options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        passed = model.generate(begun, attention_mask=torch.ones_like(begun), **options)  # type: ignore[operator]
        answers = [text[len(ids) :] for text, ids in zip(whole, prompts, strict=True)]
        return Model(folder, prompts, answers, passed.tolist())

    return made


@pytest.mark.parametrize("method", METHODS)
def test_fp32_answers_are_those_of_load(model_of: Callable[[str], Model], method: str, tmp_path: Path) -> None:
    model = model_of(method)
    engine = {"model": str(model.folder), "dtype": "float32", "enforce_eager": True}
    request = {"engine": engine, "prompts": model.prompts, "sampling": {"max_tokens": TOKENS}}
    assert len(model.prompts) == 8 and max(map(len, model.answers)) == TOKENS
    assert [output["tokens"] for output in answered(request, tmp_path).outputs] == model.answers


@pytest.fixture(scope="module")
def compared_of(
    model_of: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Compared]:
    """A method's choices in a layout, in vLLM and beside it, asked for once."""

    @lru_cache
    def made(method: str, layout: str) -> Compared:
        return compared(model_of(method), layout, tmp_path_factory.mktemp("compared"))

    return made


@pytest.mark.xfail(reason="the aim is more than the dense model reaches between two engines", strict=False)
def test_bf16_choices_behind_the_prompts_are_those_of_load(compared_of: Callable[[str, str], Compared]) -> None:
    """Logits in bf16 are so coarse that the two largest are often equal: then either is a right choice."""
    found = compared_of(WRITES, "auto")
    assert (found.gaps[found.prompted] == 0).float().mean().item() >= LEAST_SHARE


def test_bf16_choices_behind_the_prompts_are_two_numbers_apart_at_most(
    compared_of: Callable[[str, str], Compared],
) -> None:
    found = compared_of(WRITES, "auto")
    assert bool((found.gaps <= 2 * found.steps)[found.prompted].all())


@pytest.mark.parametrize(("method", "layout"), [each[:2] for each in LAYOUTS if each[2] == "expanded"])
def test_expanded_layers_choose_as_those_of_load(
    compared_of: Callable[[str, str], Compared], method: str, layout: str
) -> None:
    found = compared_of(method, layout)
    assert (found.gaps[found.prompted] == 0).float().mean().item() >= LEAST_SHARE_EXPANDED


@pytest.mark.parametrize(("method", "layout", "given"), LAYOUTS)
def test_bf16_choices_differ_by_rounding_alone(
    compared_of: Callable[[str, str], Compared], method: str, layout: str, given: str
) -> None:
    found = compared_of(method, layout)
    assert found.layouts == {given}
    assert (found.gaps == 0).float().mean().item() >= LEAST_SHARE_OF_ALL
    allowed = torch.where(found.begins, 2 * torch.maximum(found.steps, found.moved), MOST_STEPS * found.steps)
    assert bool((found.gaps <= allowed).all())
    # Rounding moves choices from those of fp32: in vLLM no more of them than in transformers, chance apart.
    better, worse = found.theirs_alone_exact, found.ours_alone_exact
    assert worse - better <= 3 * (worse + better) ** 0.5


class Compared(NamedTuple):
    """What came of choices in bf16.

    Attributes:
        layouts: In place in both.
        gaps: How far each choice is below ``usllm.load``'s own.
        steps: From one number of bf16 to the next, there.
        moved: By how much ``usllm.load``'s logits differ from those in fp32 at most, there.
        begins: Whether it is one of the first two of a text.
        prompted: Whether the text is a prompt with its answer.
        theirs_alone_exact: How many of vLLM's are those of ``usllm.load`` in fp32 where its own in bf16 are not.
        ours_alone_exact: The other way round.
    """

    layouts: set[str]
    gaps: torch.Tensor
    steps: torch.Tensor
    moved: torch.Tensor
    begins: torch.Tensor
    prompted: torch.Tensor
    theirs_alone_exact: int
    ours_alone_exact: int


@torch.no_grad()
def compared(model: Model, layout: str, work: Path) -> Compared:
    """vLLM in bf16 beside ``usllm.load``, teacher-forced: at each place of a text both are asked for the next token."""
    engine: dict[str, Any] = {"model": str(model.folder), "dtype": "bfloat16"}
    engine["additional_config"] = {"usllm": {"layout": layout}}
    sampling = {"max_tokens": 1, "prompt_logprobs": 1}
    answers = answered({"engine": engine, "prompts": model.texts, "sampling": sampling}, work)

    def logits(dtype: torch.dtype, layout: str) -> torch.Tensor:
        ours = usllm.load(model.folder, dtype=dtype, layout=layout)
        if dtype == torch.bfloat16:
            assert answers.layouts == {name: layer.layout for name, layer in packed_layers(ours).items()}
        return torch.cat([ours(torch.tensor([text])).logits[0, :-1].float() for text in model.texts])

    rounded, whole = logits(torch.bfloat16, layout), logits(torch.float32, "decoded")
    exact, moved = whole.argmax(-1), (rounded - whole).abs().amax(-1)
    theirs = torch.tensor([token for output in answers.outputs for token in output["choices"]])
    largest = rounded.amax(-1)
    gaps = largest - rounded.gather(1, theirs[:, None])[:, 0]
    prompted = torch.arange(len(gaps)) < sum(len(text) - 1 for text in model.texts[: len(model.prompts)])
    share, same = (gaps == 0).float().mean().item(), (rounded.argmax(-1) == theirs).float().mean().item()
    told = ", ".join(f"{gap:.3f}" for gap in gaps[gaps > 0].tolist())
    theirs_exact, ours_exact = exact == theirs, exact == rounded.argmax(-1)
    print(f"\n{share:.2%} of {len(gaps)} choices are equal ({same:.2%} without ties); gaps of the others: {told}")
    of_prompts = (gaps[prompted] == 0).float().mean().item()
    print(f"{of_prompts:.2%} of the {int(prompted.sum())} behind the prompts")
    print(f"as in fp32: {int(theirs_exact.sum())} of vLLM's, {int(ours_exact.sum())} of usllm.load's")
    alone = int((theirs_exact & ~ours_exact).sum()), int((ours_exact & ~theirs_exact).sum())
    steps = 2.0 ** (largest.abs().clamp(min=1e-6).log2().floor() - 7)  # from a number of bf16 to the next
    begins = torch.cat([torch.arange(len(text) - 1) < 2 for text in model.texts])
    return Compared(set(answers.layouts.values()), gaps, steps, moved, begins, prompted, *alone)


def passages() -> list[str]:
    """Texts of Python's documentation, from its beginning, middle and end."""
    from pydoc_data.topics import topics

    long = [" ".join(text.split()) for _, text in sorted(topics.items()) if len(text) > 20 * PASSAGE]
    assert len(long) >= PASSAGES
    return [long[number * len(long) // PASSAGES] for number in range(PASSAGES)]
