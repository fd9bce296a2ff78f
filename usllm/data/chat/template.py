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
    template's invitation to answer, is continued with, up to the mark that ends the turn.

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
                f"{key}.messages_field: the tokenizer of {name} has no chat template; take the instruct model of the "
                "family, or give text_field a column of plain text"
            )
        if not tokenizer.is_fast:
            raise UserError(f"{key}.messages_field: the tokenizer of {name} is a slow one, which tells no offsets")
        self.tokenizer, self.loss_on, self.key, self.name = tokenizer, loss_on, key, name
        # Longest first: a mark may begin with another one.
        self._marks = tuple(sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True))

    def __call__(self, messages: Messages) -> Written:
        """A conversation as tokens.

        Raises:
            UserError: the template refuses it, or writes a turn of the assistant otherwise than it asks for it. It is
                named by its beginning: in which row it was is not known any more, some were set aside.
        """
        where = f"{self.key}, the conversation that begins {messages[0]['content'][:_SHOWN]!r}"
        whole = self._text(messages, where)
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
            raise UserError(f"{where}: the assistant's turns are empty: there is nothing to learn; take it out")
        return Written(ids, labels)

    def identity(self) -> bytes:
        """Fingerprint of what decides, besides the tokenizer, how conversations become tokens."""
        return hashlib.sha256(f"{self.tokenizer.chat_template}|{self.loss_on}".encode()).digest()

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
            asked = self._text(messages[:first], where, invited=True) if first else ""
            answered = self._text(messages[:number], where)
            if not (answered.startswith(asked) and whole.startswith(answered)):
                raise UserError(
                    f"{where}: the chat template of {self.name} writes message {first + 1} otherwise once the "
                    "conversation goes on, so that its tokens cannot be told; pass data.loss_on=all, or give the "
                    "tokenizer a template that does not"
                )
            yield len(asked), len(self._without_line_end(answered, len(asked)))

    def _without_line_end(self, text: str, begin: int) -> str:
        """``text`` without the white space behind the mark that ends the turn: nobody asks the model for it."""
        bare = text.rstrip()
        return bare if len(bare) > begin and bare.endswith(self._marks) else text

    def _text(self, messages: Sequence[dict[str, str]], where: str, invited: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": invited}
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), **arguments)  # type: ignore[assignment]
        except TemplateError as error:
            raise UserError(
                f"{where}: the chat template of {self.name} refuses it ({first_line(error)}); mend the conversation, "
                "or take it out"
            ) from error
        return text
