"""Conversations in the form of the model's own chat template, and which of their tokens are learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from usllm.data.batches import NO_TARGET
from usllm.data.sources.messages import ALL, ASSISTANT, Messages
from usllm.system.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
"""What templates that write the date are told: with the day of a run its tokens would change while it lasts."""
# In jinja: transformers hands no function to a template. What ends it keeps the line end that may follow.
_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('{sign}', '{text}')" for sign, text in TODAY.items())
    + "|replace('%H', '00')|replace('%I', '12')|replace('%M', '00')|replace('%S', '00')|replace('%p', 'AM') }}"
    + "{% endmacro %}{{ '' }}"
)
_SHOWN = 40
"""Characters of a conversation that name it."""


class Written(NamedTuple):
    """A conversation as tokens.

    Attributes:
        input_ids: as the template writes it, whole.
        labels: the same, with ``NO_TARGET`` in place of what is not learnt.
    """

    input_ids: list[int]
    labels: list[int]


class ChatTemplate:
    """From conversations to tokens.

    The assistant's turns are what it would be asked for: the text that a conversation up to a turn, with the
    template's invitation to answer, is continued with, up to the mark that ends the turn. A turn that nobody is invited
    to (the first message, or one whose invitation goes on otherwise, with a thought) is learnt from its content on.

    Args:
        tokenizer: with a chat template.
        loss_on: ``assistant`` or ``all``: the turns that are learnt, or whole conversations but for their first token.
        key: what the source is called in the configuration, for messages.

    Raises:
        UserError: there is no template, or the tokenizer does not say which text a token comes from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, key: str) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{key}.messages_field: the model's tokenizer ({name}) has no chat template; choose an instruct model "
                "with model=…, or another data=… with a column of plain text"
            )
        if not tokenizer.is_fast:
            raise UserError(f"{key}.messages_field: the tokenizer of {name} is a slow one, which tells no offsets")
        self.tokenizer, self.loss_on, self.key, self.name = tokenizer, loss_on, key, name
        self._template = str(tokenizer.chat_template)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        # Longest first: a mark may end with another one.
        self._marks = tuple(sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True))

    def __call__(self, messages: Messages) -> Written:
        """A conversation as tokens.

        Raises:
            UserError: the template refuses it, or writes a turn of the assistant otherwise than it asks for it. It is
                named by its beginning: in which row it was is not known any more, some were set aside.
        """
        where = f"{self.key}, the conversation that begins {messages[0]['content'][:_SHOWN]!r}"
        whole = self._text(messages, where)
        self._refuse_unwritten(messages, whole, where)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if self.loss_on == ALL:
            return Written(ids, [NO_TARGET, *ids[1:]])
        spans, labels = list(self._turns(messages, whole, where)), []
        ahead = iter([*spans, (len(whole) + 1, len(whole) + 1)])
        begin, end = next(ahead)
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
            while first >= end:
                begin, end = next(ahead)
            labels.append(token if begin <= first and last <= end else NO_TARGET)
        if all(label == NO_TARGET for label in labels[1:]):
            raise UserError(f"{where}: the chat template of {self.name} writes nothing to learn; take it out")
        return Written(ids, labels)

    def identity(self) -> bytes:
        """Fingerprint of what decides, besides the tokenizer, how conversations become tokens."""
        marks = sorted((key, str(value)) for key, value in self.tokenizer.special_tokens_map.items())
        words = (self._template, self.loss_on, marks, self._marks, _CLOCK)
        return hashlib.sha256(repr(words).encode()).digest()

    def _turns(self, messages: Messages, whole: str, where: str) -> Iterator[tuple[int, int]]:
        """Where the assistant's turns begin and end in the text; turns that follow one another are one."""
        number = 0
        while number < len(messages):
            if messages[number]["role"] != ASSISTANT:
                number += 1
                continue
            first = number
            while number < len(messages) and messages[number]["role"] == ASSISTANT:
                number += 1
            answered = self._text(messages[:number], where)
            begin = self._begin(messages, first, answered, where)
            end = self._end(answered, whole)
            if begin is None or end is None or end < begin or not whole.startswith(answered[:begin]):
                raise UserError(
                    f"{where}: the chat template of {self.name} writes message {first + 1}, or what comes before it, "
                    "otherwise once the conversation goes on, so that its tokens cannot be told; pass "
                    "data.loss_on=all, or give the tokenizer a template that does not"
                )
            yield begin, end

    def _begin(self, messages: Messages, first: int, answered: str, where: str) -> int | None:
        """Behind the invitation to answer; where there is none before this turn, where its content begins."""
        before = ""
        if first:
            asked = self._text(messages[:first], where, invited=True)
            if answered.startswith(asked):
                return len(asked)
            before = self._text(messages[:first], where)
        content = messages[first]["content"].strip()
        place = answered.find(content, len(before)) if content and answered.startswith(before) else -1
        return None if place < 0 else place

    def _end(self, answered: str, whole: str) -> int | None:
        """Behind the mark that ends a turn, without white space, for which nobody asks the model.

        Some templates put another mark behind the last turn, which is not there where the conversation goes on.
        """
        while not whole.startswith(answered):
            bare = answered.rstrip()
            mark = next((mark for mark in self._marks if bare.endswith(mark)), None)
            if mark is None:
                return None
            answered = bare.removesuffix(mark)
        bare = answered.rstrip()
        return len(bare) if bare.endswith(self._marks) else len(answered)

    def _refuse_unwritten(self, messages: Messages, whole: str, where: str) -> None:
        """Refuse a conversation of which the template leaves a message out without a word."""
        for number, message in enumerate(messages):
            if message["role"] in ("user", ASSISTANT) or not message["content"].strip():
                continue
            others = [*messages[:number], *messages[number + 1 :]]
            try:
                same = self._text(others, where) == whole
            except UserError:  # it is needed, then
                continue
            if same:
                raise UserError(
                    f"{where}: the chat template of {self.name} leaves out message {number + 1}, of the role "
                    f"{message['role']}, which it does not know; take it out, or give the tokenizer another template"
                )

    def _text(self, messages: Sequence[dict[str, str]], where: str, invited: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": invited}
        if "strftime_now" in self._template:
            arguments["chat_template"] = _CLOCK + self._template
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), **arguments)  # type: ignore[assignment]
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UserError(
                f"{where}: the chat template of {self.name} refuses it ({first_line(error)}); mend the conversation, "
                "or take it out"
            ) from error
        return text
