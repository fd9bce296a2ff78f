"""Which tokens of a conversation are learnt: what the assistant would be asked for, and the mark that ends it."""

from __future__ import annotations

import pytest
from chat_templates import DEAF, FORGETFUL, STRICT, TURNS, tokenizer, turns
from transformers import AddedToken

from usllm.data.batches import NO_TARGET
from usllm.data.chat.template import ChatTemplate
from usllm.system.errors import UserError

END = 256


def learnt(template: str, messages: list[dict[str, str]], loss_on: str = "assistant") -> str:
    """What is learnt of a conversation; ``·`` for every token that is not."""
    bytes_of = tokenizer(template)
    written = ChatTemplate(bytes_of, loss_on, "data.train")(messages)
    assert len(written.labels) == len(written.input_ids)
    assert all(label in (token, NO_TARGET) for label, token in zip(written.labels, written.input_ids, strict=True))
    pieces = ["·" if label == NO_TARGET else bytes_of.decode([label]) for label in written.labels]
    return "".join(pieces)


def test_answers_are_learnt_up_to_the_mark_that_ends_them() -> None:
    messages = turns("Hi", "Hello", "Bye", "Yes ")
    hidden = ["·" * len("[user]Hi") + "··[assistant]".replace("[assistant]", "·" * 11), "·" * len("\n[user]Bye")]
    assert learnt(TURNS, messages) == f"{hidden[0]}Hello<|endoftext|>{hidden[1]}{'·' * 13}Yes <|endoftext|>·"


def test_answers_in_a_row_are_one() -> None:
    messages = [*turns("Hi", "One"), {"role": "assistant", "content": "Two"}]
    assert learnt(TURNS, messages).replace("·", "") == "One<|endoftext|>\n[assistant]Two<|endoftext|>"


def test_nothing_before_the_content_is_learnt_where_nobody_is_invited() -> None:
    assert learnt(TURNS, turns("Hello", "Hi", first="assistant")).startswith("·" * 11 + "Hello<|endoftext|>·")
    thinking = TURNS.replace("{{ '[assistant]' }}", "{{ '[assistant]<think>' }}")
    assert learnt(thinking, turns("Hi", "Hello", "Bye", "Yes")).replace("·", "") == "Hello<|endoftext|>Yes<|endoftext|>"


def test_mark_behind_the_last_turn_alone_is_no_part_of_the_others() -> None:
    closing = TURNS + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    found = learnt(closing, turns("Hi", "Hello", "Bye", "Yes")).replace("·", "")
    assert found == "Hello<|endoftext|>Yes<|endoftext|>\n<|endoftext|>"


def test_added_mark_that_is_special_ends_a_turn() -> None:
    bytes_of = tokenizer(TURNS.replace("<|endoftext|>", "<end>"))
    bytes_of.add_tokens([AddedToken("<end>", special=True)])
    written = ChatTemplate(bytes_of, "assistant", "data.train")(turns("Hi", "Hello"))
    assert bytes_of.decode([label for label in written.labels if label != NO_TARGET]) == "Hello<end>"


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    asked = "{%- if strftime_now is defined %}{{ strftime_now(form) }}{% endif %}\n"
    for form, day in (("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%B %d, %Y", "July 26, 2024")):
        dated = asked.replace("form", f"'{form}'") + TURNS
        written = ChatTemplate(tokenizer(dated), "all", "data.train")(turns("Hi", "Ho"))
        assert tokenizer().decode(written.input_ids).startswith(f"{day}[user]")


def test_what_a_template_reads_besides_itself_is_part_of_its_identity() -> None:
    one, other = tokenizer("{{ bos_token }}" + TURNS), tokenizer("{{ bos_token }}" + TURNS)
    other.bos_token = "!"
    assert ChatTemplate(one, "all", "a").identity() != ChatTemplate(other, "all", "a").identity()
    assert ChatTemplate(one, "all", "a").identity() != ChatTemplate(one, "assistant", "a").identity()


def test_what_the_user_says_last_is_not_learnt() -> None:
    assert learnt(TURNS, turns("Hi", "Hello", "Bye")).replace("·", "") == "Hello<|endoftext|>"


def test_all_is_learnt_but_the_first_token_where_asked_for() -> None:
    assert learnt(TURNS, turns("Hi", "Ho"), "all") == "·user]Hi<|endoftext|>\n[assistant]Ho<|endoftext|>\n"


def test_answers_of_several_bytes_a_sign_are_whole() -> None:
    written = ChatTemplate(tokenizer(), "assistant", "data.train")(turns("Ä", "Öß€ 🙂"))
    kept = [label for label in written.labels if label != NO_TARGET]
    assert tokenizer().decode(kept) == "Öß€ 🙂<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, turns("a", "b"), r"data\.train\.messages_field: the model's tokenizer \(.*\) has no chat template"),
        (
            STRICT,
            turns("a", "b", first="assistant"),
            r"data\.train, the conversation that begins 'a': the chat template of .* \(TemplateError: roles must",
        ),
        (
            FORGETFUL,
            turns("a", "b", "c", "d"),
            r"writes message 2, or what comes before it, .*loss_on=all",
        ),
        ("{{ messages[0]['content'] }}{{ messages[1]", turns("a", "b"), r"the chat template of .* refuses it"),
        ("{{ 1 + 'x' }}", turns("a", "b"), r"the chat template of .* refuses it \(TypeError"),
        (TURNS, [{"role": "assistant", "content": ""}], r"writes message 1, or what comes before it, otherwise"),
        (DEAF, [*turns("a", "b"), {"role": "tool", "content": "42"}], r"leaves out message 3, of the role tool"),
        ("{{ 'x' }}", turns("a", "b"), r"begins 'a': the chat template of .* writes nothing to learn"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    template: str | None, messages: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ChatTemplate(tokenizer(template), "assistant", "data.train")(messages)
    assert "\n" not in str(caught.value)


def test_a_template_that_forgets_is_learnt_whole() -> None:
    assert learnt(FORGETFUL, turns("a", "b", "c", "d"), "all") == "·user]a[short][user]c[assistant]d"
