"""Documents of a test set that were trained on are found, also when they were copied with small changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from usllm.data import overlap
from usllm.data.overlap import SharedDocuments, count_shared, kept_hashes, paragraph_hashes

ONE = "The quick brown fox jumps over the lazy dog and sleeps."
TWO = "Of all the rivers in the world this is by far the longest."
OTHER = "A sentence of which no training text has ever made any use."


def shared(test: list[str], train: list[str], folder: Path) -> SharedDocuments:
    return count_shared("t", test, kept_hashes(Dataset.from_dict({"text": train}), repr(train).encode().hex(), folder))


@pytest.mark.parametrize(
    "copied",
    [
        ONE,
        ONE.upper(),
        f"  {ONE} \n",
        ONE.replace(" ", "\n"),
        f"{ONE}\n \n{OTHER}",
        f"Heading\n\n{ONE}\n\n{TWO}\n\n{OTHER}",
    ],
)
def test_copy_with_other_case_space_or_cut_is_found(copied: str, tmp_path: Path) -> None:
    assert shared([copied, OTHER], [f"{ONE}\n\n{TWO}"], tmp_path) == SharedDocuments("t", 2, 1)


@pytest.mark.parametrize(
    "own", [OTHER, "Heading", "", f"{ONE} And more.", f"{ONE}\n\n{OTHER}\n\n{OTHER.replace('A', 'Another')}"]
)
def test_document_of_its_own_is_not(own: str, tmp_path: Path) -> None:
    assert shared([own], [f"Heading\n\n{ONE}\n\n{TWO}"], tmp_path).shared == 0


def test_text_without_paragraphs_shares_nothing(tmp_path: Path) -> None:
    assert shared([ONE], ["short"], tmp_path).shared == 0


def test_hashes_are_made_once_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Dataset.from_dict({"text": [ONE, ONE, TWO]})
    first = kept_hashes(documents, "a" * 64, tmp_path)
    assert first.tolist() == sorted({number for row in paragraph_hashes([ONE, TWO]) for number in row})
    monkeypatch.setattr(overlap, "paragraph_hashes", lambda _: pytest.fail("hashed again"))
    assert kept_hashes(documents, "a" * 64, tmp_path).tolist() == first.tolist()


@pytest.mark.parametrize(("found", "warned"), [(0, False), (1, False), (2, True), (100, True)])
def test_more_than_one_percent_is_a_warning(found: int, warned: bool) -> None:
    warning = SharedDocuments("wiki", 100, found).warning
    assert (warning is not None) == warned
    if warning is not None:
        assert f"{found} of 100 documents ({found}.0%) of test set wiki" in warning
