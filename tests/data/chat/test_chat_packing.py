"""Conversations side by side: whole where they fit, apart, learnt once each, without padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_templates import STRICT, tokenizer, turns
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from usllm.data.batches import NO_TARGET
from usllm.data.chat.packing import Tokens, pack_conversations, packed
from usllm.data.chat.template import ChatTemplate
from usllm.data.sources import documents_table
from usllm.data.sources.messages import conversation, spoken
from usllm.system.errors import UserError

FIRST = 7


def some(lengths: list[int]) -> list[Tokens]:
    """Conversations of distinct tokens, from 1,000 on, of which the second half is learnt."""
    found, begin = [], 1000
    for length in lengths:
        ids = np.arange(begin, begin + length, dtype=np.int32)
        found.append(Tokens(ids, np.where(np.arange(length) < length // 2, np.int32(NO_TARGET), ids)))
        begin += length
    return found


def parts(row: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of what lies side by side in a sequence."""
    ids, labels, positions = row.tolist()
    begins = [place for place, position in enumerate(positions) if position == 0]
    found = []
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        assert positions[begin:end] == list(range(end - begin))
        found.append((ids[begin:end], labels[begin:end]))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(4, 24), st.sampled_from([None, FIRST]))
def test_each_target_is_learnt_once_behind_all_that_its_sequence_can_hold(
    lengths: list[int], length: int, first: int | None
) -> None:
    written = some(lengths)
    owner = {token: number for number, one in enumerate(written) for token in one.input_ids.tolist()}
    rows = list(packed(written, length, first))
    seen: Counter[int] = Counter()
    for row in rows:
        assert row.shape == (3, length)
        for ids, labels in parts(row):
            own = ids[1:] if ids[0] == FIRST else ids
            assert len({owner[token] for token in own}) <= 1  # one conversation, or nothing but the first token
            assert own == list(range(own[0], own[0] + len(own))) if own else True
            targets = [label for label in labels if label != NO_TARGET]
            if targets and len(written[owner[own[0]]].input_ids) + (first is not None) <= length:
                assert own == written[owner[own[0]]].input_ids.tolist()  # whole: nothing that it answers to is missing
            seen.update(targets)
    assert max(seen.values(), default=1) == 1
    cut = [one for one in written if len(one.input_ids) + (first is not None) > length]
    expected = {label for one in written for label in one.labels[1:].tolist() if label != NO_TARGET}
    lost = expected - set(seen)
    # Nothing predicts the first token of a part of a conversation that is longer than a sequence.
    assert len(lost) <= sum(len(one.input_ids) // (length - (first is not None)) for one in cut)


def test_parts_in_which_nothing_is_learnt_are_left_out() -> None:
    ids = np.arange(1000, 1100, dtype=np.int32)
    long = Tokens(ids, np.where(ids < 1096, np.int32(NO_TARGET), ids))
    (row,) = packed([long], 16)  # of which the last part has four
    assert parts(row)[0][0] == list(range(1096, 1100))
    assert not list(packed([Tokens(ids, np.full_like(ids, NO_TARGET))], 16))


def test_sequences_are_full_and_few() -> None:
    rows = list(packed(some([10, 6, 6, 4, 2]), 16))
    assert [len(parts(row)) for row in rows] == [2, 3 + 1]  # 10 + 6, and 6 + 4 + 2 with the beginning of the first
    assert parts(rows[1])[-1] == (list(range(1000, 1004)), [NO_TARGET] * 4)


def test_short_conversations_fill_a_sequence_one_after_another() -> None:
    (row,) = packed(some([3, 2]), 16)
    assert [len(ids) for ids, _ in parts(row)] == [3, 2, 3, 2, 3, 2, 1]
    assert [label for _, labels in parts(row)[2:] for label in labels] == [NO_TARGET] * 11


def table(*conversations: list[dict[str, str]]) -> Dataset:
    written = [conversation(messages, "here") for messages in conversations]
    return documents_table(spoken(written), "here", written)


def test_rows_come_from_a_cache_that_template_and_what_is_learnt_decide(tmp_path: Path) -> None:
    documents = table(*[turns(f"question {n}", f"answer {n}") for n in range(50)])

    def rows(loss_on: str = "assistant", template: str | None = None) -> list[dict[str, list[int]]]:
        made = ChatTemplate(tokenizer() if template is None else tokenizer(template), loss_on, "data.train")
        return list(pack_conversations(documents, made, 64, key="data.train", cache_dir=tmp_path, window_start="none"))

    found = rows()
    assert rows() == found
    assert len(list((tmp_path / "sequences").iterdir())) == 1
    assert [row["input_ids"] for row in rows("all")] == [row["input_ids"] for row in found]
    assert rows("all") != found
    assert rows(template=STRICT) != found
    assert len(list((tmp_path / "sequences").iterdir())) == 3


def test_processes_do_not_change_the_result(tmp_path: Path) -> None:
    documents, template = (
        table(*[turns(f"question {n}", "yes") for n in range(600)]),
        ChatTemplate(tokenizer(), "all", "a"),
    )
    one, two = (
        pack_conversations(
            documents, template, 64, key="data.train", cache_dir=tmp_path / str(processes), num_proc=processes
        )
        for processes in (1, 2)
    )
    assert one[:] == two[:]


def test_questions_whose_answer_is_never_predicted_are_refused(tmp_path: Path) -> None:
    template = ChatTemplate(tokenizer(), "assistant", "data.train")
    # The answer is nothing but the mark that ends it, and that is the first token of the last part.
    documents = table(turns("x" * 70, ""), turns("x" * 70, ""))
    (written,) = {tuple(template(turns("x" * 70, "")).labels)}
    place = next(place for place, label in enumerate(written) if label != NO_TARGET)
    with pytest.raises(UserError, match=r"no part of a conversation holds a target; take a longer data"):
        pack_conversations(documents, template, place, key="data.train", cache_dir=tmp_path, window_start="none")


def test_too_little_text_and_a_wrong_conversation_are_named(tmp_path: Path) -> None:
    template = ChatTemplate(tokenizer(STRICT), "assistant", "data.train")
    with pytest.raises(UserError, match=r"data\.train holds 4 tokens, fewer than one sequence"):
        pack_conversations(
            table(turns("a", "b")), template, 64, key="data.train", cache_dir=tmp_path, window_start="none"
        )
    wrong = table(turns("a", "b"), turns("x", "b", first="assistant"))
    with pytest.raises(UserError, match=r"data\.train, the conversation that begins 'x': the chat template of"):
        pack_conversations(wrong, template, 2, key="data.train", cache_dir=tmp_path, window_start="none")
