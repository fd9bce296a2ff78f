"""A text is what it says, wherever it lies and however it is packed."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from usllm.data import SourceSpec
from usllm.data.datamodule import TextDataModule
from usllm.models.random_model import byte_tokenizer
from usllm.system.errors import UserError

TEXT = "\n\n".join(f"document {number} of a text" for number in range(40))


def _module(path: Path, content: str = TEXT, tokenizer: Any = None, **options: Any) -> TextDataModule:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    source = SourceSpec(kind="text", path=str(path))
    folder = path.parent / "cache"
    return TextDataModule(tokenizer or byte_tokenizer(), source, context_length=8, cache_dir=folder, **options)


@pytest.mark.parametrize("name", ["a.txt", "elsewhere/b.txt", "a.txt.gz"])
def test_the_same_text_in_another_file_is_the_same(name: str, tmp_path: Path) -> None:
    saved = _module(tmp_path / "a.txt").state_dict()
    assert set(saved) == {"data.train", "data.validation"}
    other = _module(tmp_path / name, seed=5, batch_size=1)
    assert other.state_dict() == saved
    other.load_state_dict(saved)


def test_changed_text_is_named_with_both_sizes(tmp_path: Path) -> None:
    saved = _module(tmp_path / "a.txt").state_dict()
    changed = _module(tmp_path / "a.txt", TEXT.replace("document 7", "documents 7"))
    with pytest.raises(UserError) as refused:
        changed.load_state_dict(saved)
    message = str(refused.value)
    assert "data.train: 39 documents of " in message
    assert "of another content in this run" in message
    assert "\n" not in message


def test_changed_validation_text_is_named(tmp_path: Path) -> None:
    held = SourceSpec(kind="text", path=str(tmp_path / "held.txt"))
    (tmp_path / "held.txt").write_text(TEXT)
    saved = _module(tmp_path / "a.txt", validation=held).state_dict()
    (tmp_path / "held.txt").write_text(TEXT[:-1])
    with pytest.raises(UserError, match=r"since the checkpoint was made: data\.validation: 40 documents of \S+ char"):
        _module(tmp_path / "a.txt", validation=held).load_state_dict(saved)


def test_other_tokens_of_the_same_text_are_named(tmp_path: Path) -> None:
    saved = _module(tmp_path / "a.txt").state_dict()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["document"])
    with pytest.raises(UserError, match=r"data\.train: the same text, but the tokenizer makes other tokens"):
        _module(tmp_path / "a.txt", tokenizer=tokenizer).load_state_dict(saved)


def test_checkpoint_of_an_older_version_says_nothing_about_texts(tmp_path: Path) -> None:
    _module(tmp_path / "a.txt").load_state_dict({})
