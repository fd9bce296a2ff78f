"""One line of any length is read and tokenised once and whole: the tokenizer's work grows as the text does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from usllm.data.packing import pack
from usllm.data.sources import SourceSpec, read_documents
from usllm.eval.perplexity import tokenise_test_sets

END = 256
SIZES = [1_000, 5_000_000]


class Counting:
    """A tokenizer of one token for each thousand signs that keeps how many signs it was given, text by text."""

    eos_token_id = END
    bos_token_id = None

    def __init__(self) -> None:
        self.fed: list[int] = []

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        self.fed += [len(each) for each in texts]
        ids = [[len(each) % 250] * max(1, len(each) // 1000) for each in texts]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)


@pytest.fixture(params=SIZES)
def line(request: pytest.FixtureRequest, tmp_path: Path) -> SourceSpec:
    """A file of one line without an end, of so many signs."""
    path = tmp_path / "line.txt"
    path.write_text(("word " * (request.param // 5))[: request.param].rstrip() + ".")
    return SourceSpec(kind="text", path=str(path))


def test_line_of_a_test_set_is_tokenised_once(line: SourceSpec) -> None:
    tokenizer: Any = Counting()
    tokenise_test_sets({"line": line}, tokenizer)
    assert tokenizer.fed == [len(Path(line.paths[0]).read_text())]


def test_line_of_training_is_tokenised_once(line: SourceSpec, tmp_path: Path) -> None:
    tokenizer: Any = Counting()
    pack(read_documents(line, "data.train"), tokenizer, 2, key="data.train", cache_dir=tmp_path, num_proc=1)
    probe, *texts = tokenizer.fed  # what a tokenizer adds by itself shows only in use
    assert probe < 100
    assert texts == [len(Path(line.paths[0]).read_text())]
