"""Launch parameters by card: a table where one lies, the defaults elsewhere, and nothing wrong is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from usllm_kernels import cards
from usllm_kernels.cards import DEFAULTS, card_name, launch_parameters, table_text, tried_parameters

CPU = torch.device("cpu")


def test_without_a_table_the_defaults_hold() -> None:
    assert {kernel: launch_parameters(kernel, CPU) for kernel in DEFAULTS} == DEFAULTS


def test_a_table_is_read_and_what_it_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    text = table_text({"query": {"channels": 64, "num_warps": 8}})
    (tmp_path / "nvidia_h200.json").write_text(text, encoding="utf-8")
    found = cards._of_card("nvidia_h200", tmp_path)
    assert found["query"] == {**DEFAULTS["query"], "channels": 64, "num_warps": 8}
    assert found["few_tokens"] == DEFAULTS["few_tokens"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "is damaged"),
        ("[]", "no object of kernels"),
        ('{"other": {}}', "'other' is no kernel of order, query"),
        ('{"query": {"channels": 48}}', "query.channels=48 must be a power of two"),
        ('{"query": {"rows": 2}}', "query.rows=2 must be a power of two, one of channels, outputs"),
        ('{"query": {"channels": true}}', "query.channels=True"),
    ],
)
def test_a_damaged_table_is_named(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a_card.json").write_text(table, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a_card\.json.*{message}"):
        cards._of_card("a_card", tmp_path)


def test_tried_parameters_hold_inside_their_block() -> None:
    with tried_parameters("query", {"num_warps": 2}):
        assert launch_parameters("query", CPU)["num_warps"] == 2
        with tried_parameters("query", {"num_warps": 8}):
            assert launch_parameters("query", CPU)["num_warps"] == 8
        assert launch_parameters("query", CPU)["num_warps"] == 2
    assert launch_parameters("query", CPU) == DEFAULTS["query"]
    with pytest.raises(ValueError, match="power of two"), tried_parameters("query", {"num_warps": 3}):
        pass


def test_committed_tables_are_good() -> None:
    for path in Path(cards.__file__).parent.glob("*.json"):
        assert table_text(json.loads(path.read_text(encoding="utf-8")))
        cards._of_card(path.stem)
    assert card_name(CPU) == "cpu"
