"""Hub data sets, with the hub replaced."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from usllm.data import SourceSpec
from usllm.data.sources import read_documents, read_text
from usllm.system.errors import UserError

SPEC = SourceSpec(kind="hub", name="Salesforce/wikitext", config="wikitext-2-raw-v1", document_start="^ = [^=].* = $")
ROWS = ["", " = One = \n", "", " text \n", " = Two = \n", " end \n"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def load(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_configuration_and_split_are_asked_for(asked: list[Any]) -> None:
    read_documents(SPEC, "data.train")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]


@pytest.mark.usefixtures("asked")
def test_lines_become_articles() -> None:
    assert read_documents(SPEC, "data.train")["text"][:] == [" = One = \n text \n", " = Two = \n end \n"]


@pytest.mark.usefixtures("asked")
def test_test_text_joins_all_rows_as_papers_do() -> None:
    assert read_text(SPEC, "x") == "\n\n".join(ROWS)


def test_unreachable_hub_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        read_documents(SPEC, "data.train")
    message = str(caught.value)
    assert message.startswith("data.train: ")
    assert "data=pydoc" in message
    assert "\n" not in message


@pytest.mark.usefixtures("asked")
def test_missing_column_is_named() -> None:
    with pytest.raises(UserError, match="no column 'body'"):
        read_documents(SourceSpec(kind="hub", name="a/b", text_field="body"), "data.train")
