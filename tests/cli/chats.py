"""A model with a chat template, conversations to tune it on, and the settings of a run on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from chat_templates import tokenizer

from usllm.models.random_model import random_model


def chat_run(folder: Path, words: list[str], architecture: str = "llama") -> list[str]:
    """Overrides of a run; writes its model and its text into a folder.

    Args:
        folder: Empty.
        words: That conversations are made of.
        architecture: Of the model.
    """
    draw = random.Random(0)

    def said() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 6)))

    rows = []
    for _ in range(200):
        asked, answered = {"role": "user", "content": said()}, {"role": "assistant", "content": said()}
        rows.append(json.dumps({"messages": [asked, answered] * draw.randint(1, 2)}))
    (folder / "chat.jsonl").write_text("\n".join(rows) + "\n")
    random_model(architecture).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return [f"model={folder}/model", "data=chat", f"data.train.path={folder}/chat.jsonl", "data.context_length=96"]
