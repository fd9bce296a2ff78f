"""Wrong inputs of runs on streamed corpora and on conversations, as rows of the table in wrong_inputs.py."""

from __future__ import annotations

from input_row import DONE, USER, Row, train

STREAMED = ["data=jsonl", "data.train.path=ROWS", "data.train.streaming=true", "data.validation_documents=5"]


def stream(typed: str | list[str], *words: str, status: int = USER) -> Row:
    return train([*STREAMED, *(typed if isinstance(typed, list) else [typed])], *words, status=status)


STREAMS = [
    train("data.on_bad=skip", "data.on_bad=skip: belongs to streamed text; set data.train.streaming=true"),
    train("data.shuffle_buffer=7", "data.shuffle_buffer=7: belongs to streamed text"),
    train("data.validation_documents=7", "data.validation_documents=7: are set aside from a streamed data.train"),
    train("data.train.path=hf://datasets/a/b/*.txt", "data.train.path=hf://datasets/a/b/*.txt: is an address"),
    train("data.train.path=HERE/*.txt", "data.train.path=HERE/*.txt: no such file"),
    train(
        ["data.train.kind=pydoc", "data.train.streaming=true"],
        "data.train.streaming=true: streamed are hub, parquet, jsonl",
    ),
    train("+evaluation.test_sets.a={kind: text, path: TEXT, streaming: true}", "only what is trained on is streamed"),
    stream("data.on_bad=ignore", "data.on_bad=ignore: unknown; choose one of raise, skip"),
    stream("data.shuffle_buffer=0", "data.shuffle_buffer=0: must be at least 1"),
    stream("data.validation_documents=0", "data.validation_documents=0: must be at least 1"),
    stream("data.max_sequences=5", "data.max_sequences=5: counts the sequences of packed text"),
    stream(["trainer.max_steps=null", "trainer.epochs=1"], "trainer.epochs=1: nobody knows the length of a streamed"),
    stream("data.train.path=HERE/*.jsonl", "data.train.path=HERE/*.jsonl: no such file"),
    stream("data.train.text_field=body", "ROWS, line 1 has no text in 'body'; set text_field", "data.on_bad=skip"),
    stream(["data.train.text_field=body", "data.on_bad=skip"], "data.train holds no text"),
    stream(["data=parquet", "data.train.path=TEXT"], "data.train: TEXT is plain text by its name", "not Parquet"),
    stream(["model=FOREIGN"], "holds token", "but the model has 264 tokens"),
    stream(
        "data.validation_documents=1000",
        "hold no text to train on besides the 40 documents held out; set data.validation_documents below that",
    ),
    stream(["data.train.kind=hub", "+data.train.name=HERE/none"], "cannot be found on the Hugging Face hub"),
    stream(
        ["trainer.max_steps=null", "trainer.tokens=65"],
        "2 steps x 2 sequences x 32 tokens = 128 tokens for a budget of 65, read as they come",
        status=DONE,
    ),
    stream([], "Next, try", "stream data.train", status=DONE),
]

TALKING = ["model=TALKER", "data=chat", "data.train.path=TALKS"]


def chat(typed: str | list[str], *words: str, status: int = USER) -> Row:
    return train([*TALKING, *(typed if isinstance(typed, list) else [typed])], *words, status=status)


CHATS = [
    train("data.loss_on=all", "data.loss_on=all: says which turns of conversations are learnt"),
    train("+data.train.messages_field=messages", "data.train.messages_field=messages: jsonl, parquet and hub have"),
    chat("data.loss_on=user", "data.loss_on=user: unknown; choose one of assistant, all"),
    chat("+data.train.streaming=true", "data.train.streaming=true: conversations are packed before the first step"),
    chat("+data.train.document_start=a", "data.train.document_start='a': every conversation is a document"),
    chat("data.train.path=ROWS", "data.train: ROWS, line 1 has no messages in 'messages'; set messages_field"),
    chat("data.train.messages_field=turns", "TALKS, line 1 has no messages in 'turns'; set messages_field"),
    chat("data.train.path=ALONE", "ALONE, line 1 has no turn of the assistant: there is nothing to learn from it"),
    chat("data.train.path=BOT", "BOT, line 1, message 2 has the role 'bot', which is unknown; known are system, user"),
    chat("data.train.path=TEXT", "data.train: TEXT is plain text by its name"),
    chat("model=DENSE", "data.train.messages_field: the model's tokenizer (DENSE) has no chat template"),
    chat("data.context_length=2000", "tokens, fewer than one sequence of data.context_length=2000"),
    chat("data.train.kind=hub", "data.train.kind=hub needs data.train.name"),
    chat(
        "+evaluation.test_sets.a={kind: jsonl, path: TALKS, messages_field: messages}",
        "evaluation.test_sets.a.messages_field=messages: perplexity is measured on text as it is",
    ),
    chat([], "Next, try", status=DONE),
    chat("data.loss_on=all", "Next, try", status=DONE),
]

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SHARED = [
    train("data.batch_size=100000", "data.batch_size=100000: the text has ", " sequences; give at most that"),
    train(
        ["stages=[default,reconstruct]", "stages.reconstruct.batch_size=1", *TWO],
        "stages.reconstruct.batch_size=1: 2 devices share the sequences of a step; give at least as many",
    ),
]
"""What several devices, or the sequences of a step, are too many for."""
