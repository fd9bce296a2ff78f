"""A row of the table of wrong inputs, and what begins those of each command.

In overrides and words ``TEXT``, ``LINES`` (JSON lines with half a surrogate pair), ``ROWS`` (good ones), ``RUN``,
``PACKED``, ``DENSE``, ``FOREIGN`` (a dense model whose tokenizer has more tokens than it), ``TALKER`` (one with a chat
template), ``TALKS`` (conversations), ``ALONE`` (without an answer), ``BOT`` (of an unknown role), ``TASKS``, ``FILE``,
``ODD`` (a text whose name Hydra cannot read) and ``HERE`` (the test's own folder) stand for places. ``TINY`` are the
settings of a run of seconds, ``MEASURE`` of a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

USER, FAILED, DONE = 2, 1, 0
ODD_NAME = "it's [a] ti=ny, ${x} é ~.txt"


class Row(NamedTuple):
    """What was typed after the command, the exit status, and what the message holds."""

    command: str
    typed: str | list[str]
    status: int
    words: list[str]


def train(typed: str | list[str], *words: str, status: int = USER) -> Row:
    return Row("train", ["TINY", *(typed if isinstance(typed, list) else [typed])], status, list(words))


def evaluate(typed: str | list[str], *words: str, status: int = USER) -> Row:
    return Row("eval", ["MEASURE", *(typed if isinstance(typed, list) else [typed])], status, list(words))


def generate(typed: str | list[str], *words: str, status: int = USER) -> Row:
    given = ["model=PACKED", "prompt=hi", "max_new_tokens=2"]
    return Row("generate", [*given, *(typed if isinstance(typed, list) else [typed])], status, list(words))


def export(typed: str | list[str], *words: str, status: int = USER) -> Row:
    given = ["ckpt=RUN", "out=HERE/out"]
    return Row("export", [*given, *(typed if isinstance(typed, list) else [typed])], status, list(words))


def report(typed: str | list[str], *words: str, status: int = USER) -> Row:
    given = ["runs=RUN", "out=HERE/report"]
    return Row("report", [*given, *(typed if isinstance(typed, list) else [typed])], status, list(words))
