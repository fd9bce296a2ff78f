"""Tokenizers as GGUF's metadata: what llama.cpp would do otherwise is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf_of_model import write_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from usllm.models import ModelSpec
from usllm.models.gguf_pre_tokenizers import PRE_TOKENIZERS, WRITTEN, pre_tokenizer
from usllm.models.gguf_vocabulary import vocabulary_metadata
from usllm.models.loading import load_tokenizer
from usllm.system.errors import UserError


def byte_level(pre: Any = None, ignore_merges: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Bytes, three merges, and two added tokens, the second no special one."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "ba", "aba"]
    merges = options.pop("merges", [("a", "b"), ("b", "a"), ("ab", "a")])
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre or pre_tokenizer("gpt-2")
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options)
    made.add_tokens(["<mine>"])
    return made


@pytest.mark.parametrize("name", WRITTEN)
def test_split_is_named(name: str) -> None:
    found = vocabulary_metadata(byte_level(pre_tokenizer(name), PRE_TOKENIZERS[name].whole_words_first), 264)
    assert found["tokenizer.ggml.pre"] == name


def test_every_split_that_is_read_can_be_written() -> None:
    assert {PRE_TOKENIZERS[name] for name in WRITTEN} == set(PRE_TOKENIZERS.values())


def test_tokens_have_their_kinds_and_fill_the_embedding() -> None:
    found = vocabulary_metadata(byte_level(), 264)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 264
    assert tokens[256:] == ["ab", "ba", "aba", "<end>", "<mine>", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert types[255:] == [1, 1, 1, 1, 3, 4, 5, 5, 5]
    assert found["tokenizer.ggml.merges"] == ["a b", "b a", "ab a"]
    assert found["tokenizer.ggml.eos_token_id"] == 259
    assert "tokenizer.ggml.bos_token_id" not in found


def test_frame_of_a_text_is_said() -> None:
    made = byte_level(bos_token="<begin>")
    assert vocabulary_metadata(made, 264)["tokenizer.ggml.add_bos_token"] is False
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", pair=None, special_tokens=[("<begin>", made.bos_token_id)]
    )
    found = vocabulary_metadata(made, 264)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)


def test_ends_of_turns_and_the_chat_template_are_said() -> None:
    made = byte_level(chat_template="{{ messages }}")
    found = vocabulary_metadata(made, 264, GenerationConfig(eos_token_id=[259, 260]))
    assert found["tokenizer.ggml.eot_token_id"] == 260
    assert found["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) < 5, reason="transformers 4 misreads such files")
def test_scores_repeat_the_order_of_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model.gguf", "gemma3")
    tokenizer = load_tokenizer(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))
    found = vocabulary_metadata(tokenizer, 272)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert scores["ab"] > scores["\u2581a"] > scores["\u2581b"] > scores["\u2581ab"] > scores["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": pre_tokenizers.Whitespace()}, "a way to split texts that is none of gpt-2, smollm, llama-bpe, qwen2"),
        ({"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "a way to split texts"),
        ({"pre": pre_tokenizer("llama-bpe")}, "a way to split texts"),  # without whole words first
        (
            {"pre": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a"), "isolated"), pre_tokenizer("gpt-2")])},
            "a way to split texts",
        ),
        ({"merges": []}, "no merges"),
        ({"rows": 260}, "a token of number 260, for which the model, which has 260"),
        ({"normalizer": normalizers.Lowercase()}, "the normalizer Lowercase"),
        ({"post": "<end> $A <mine>"}, "other tokens around a text"),
        ({"model": models.WordLevel({"a": 0}, unk_token="a")}, "a model of type WordLevel"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    options = {key: change[key] for key in ("pre", "merges") if key in change}
    made = byte_level(**options)
    backend = made.backend_tokenizer
    if "pre" in change:  # transformers 4 changes it while it wraps it
        backend.pre_tokenizer = change["pre"]
    if "normalizer" in change:
        backend.normalizer = change["normalizer"]
    if "post" in change:
        special = [("<end>", 259), ("<mine>", 260)]
        backend.post_processor = processors.TemplateProcessing(single=change["post"], pair=None, special_tokens=special)
    if "model" in change:
        backend.model = change["model"]
    with pytest.raises(UserError, match=message):
        vocabulary_metadata(made, change.get("rows", 264))
