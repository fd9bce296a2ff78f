"""Packing keeps every token in order, and its cache is decided by content alone."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from usllm.data import packing
from usllm.data.packing import pack
from usllm.data.windows import cut_windows
from usllm.models.random_model import byte_tokenizer
from usllm.system.errors import UserError

END = 256


def _packed(texts: list[str], length: int, folder: Path, **options: Any) -> list[list[int]]:
    documents = Dataset.from_dict({"text": texts})
    return pack(documents, byte_tokenizer(), length, key="data.train", cache_dir=folder, **options)["input_ids"][:]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(alphabet="abc é", min_size=1), min_size=1, max_size=8), st.integers(1, 9))
def test_sequences_are_the_documents_with_an_end_after_each(texts: list[str], length: int) -> None:
    tokenizer = byte_tokenizer()
    stream = [token for text in texts for token in [*tokenizer(text).input_ids, END]]
    expected = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    with TemporaryDirectory() as folder:
        if expected:
            assert _packed(texts, length, Path(folder)) == expected
        else:
            with pytest.raises(UserError):
                _packed(texts, length, Path(folder))


def test_sequences_cross_the_batches_of_tokenising(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(700)]
    tokenizer = byte_tokenizer()
    stream = [token for text in texts for token in [*tokenizer(text).input_ids, END]]
    packed = [token for row in _packed(texts, 97, tmp_path) for token in row]
    assert packed == stream[: len(stream) // 97 * 97]


def test_processes_do_not_change_the_result(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(600)]
    assert _packed(texts, 64, tmp_path / "1") == _packed(texts, 64, tmp_path / "2", num_proc=2)


def test_tokens_that_the_tokenizer_adds_stay_at_each_document(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    documents = Dataset.from_dict({"text": ["a", "b"]})
    plain = _packed(["a", "b"], 2, tmp_path)
    with_bos = pack(documents, tokenizer, 3, key="data.train", cache_dir=tmp_path)["input_ids"][:]
    assert with_bos == [[END, *plain[0]], [END, *plain[1]]]


def test_each_sequence_begins_with_the_token_where_asked_for(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(700)]  # sequences cross the batches of writing
    tokenizer = byte_tokenizer()
    stream = [token for text in texts for token in [*tokenizer(text).input_ids, END]]
    rows = _packed(texts, 97, tmp_path, window_start="each")
    # The end-of-text token is the beginning-of-text token here: one at the start of a window is not doubled.
    assert rows == cut_windows(np.array(stream), 97, END)[0].tolist()
    assert {row[0] for row in rows} == {END}
    assert rows != _packed(texts, 97, tmp_path)


def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _packed(["some text"], 4, tmp_path)
    monkeypatch.setattr(packing, "tokenised", lambda *a: pytest.fail("tokenised again"))
    assert _packed(["some text"], 4, tmp_path) == first


def test_of_two_processes_that_want_the_same_text_one_tokenises(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_pack_together, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list((tmp_path / "calls").iterdir())) == 1
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["sequences.arrow"]


def _pack_together(folder: Path, barrier: Any) -> None:
    ordinary = packing.tokenised

    def tokenise(*arguments: Any) -> Any:
        (folder / "calls").mkdir(exist_ok=True)
        (folder / "calls" / str(os.getpid())).touch()
        return ordinary(*arguments)

    packing.tokenised = tokenise
    barrier.wait(30)
    assert _packed(["some text"] * 50, 4, folder / "cache")


def test_cache_holds_sequences_only(tmp_path: Path) -> None:
    _packed(["some text"] * 600, 4, tmp_path, num_proc=2)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sequences.arrow"]


def test_text_length_and_tokenizer_each_make_an_entry(tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": ["some text"]})
    other = byte_tokenizer()
    other.add_tokens(["text"])
    _packed(["some text"], 4, tmp_path)
    _packed(["some texts"], 4, tmp_path)
    _packed(["some", " text"], 4, tmp_path)
    _packed(["some text"], 5, tmp_path)
    pack(documents, other, 4, key="data.train", cache_dir=tmp_path)
    assert len(list((tmp_path / "sequences").iterdir())) == 5


def test_too_short_text_says_how_many_tokens_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train holds 5 tokens.*data\.context_length=6"):
        _packed(["four"], 6, tmp_path)
    assert list((tmp_path / "sequences").iterdir()) == []


def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="end-of-text"):
        pack(Dataset.from_dict({"text": ["a"]}), tokenizer, 1, key="data.train", cache_dir=tmp_path)
