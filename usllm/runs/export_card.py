"""The facts of a card that an export writes: perplexities of the run, of the folder itself, and how it was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from usllm.config.packed import ExportConfig
from usllm.data.windows import resolved_rule
from usllm.models.loading import load_config, load_tokenizer
from usllm.packed.card import CardFacts
from usllm.runs.cards import card_facts
from usllm.runs.export_origin import Origin
from usllm.runs.inputs import build_data, shared_documents, sharing, token_streams
from usllm.runs.measure import measure, merge_stages
from usllm.runs.report import print_warnings
from usllm.system.stage_names import HEADINGS, with_todays_names


class ExportCard:
    """What the card of an export says, checked before long work.

    Args:
        config: Checked configuration.
        command: What the user typed.
        origin: Of what is exported.
        measured_before: What the figures of the run stand for, where the folder itself is not measured.

    Raises:
        UserError: The window start that is asked for is not one of this model's.
    """

    def __init__(self, config: ExportConfig, command: str, origin: Origin, measured_before: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(origin.spec)
        self.model_config = load_config(origin.spec)
        self._config, self._origin, self._measured_before = config, origin, measured_before
        asked = origin.evaluation.window_start
        self._rule = resolved_rule(asked, self.model_config.model_type, self.tokenizer, "evaluation.window_start")
        self._commands = [*([origin.report["command"]] if origin.report else []), command]

    def facts(self, folder: Path, load: Callable[[Path], PreTrainedModel]) -> CardFacts:
        """Facts about a folder under construction.

        Args:
            folder: The folder.
            load: Reads its model, to be measured where that was asked for.
        """
        origin = self._origin
        rows = list(origin.report.get("perplexity", []))
        if self._config.measure:
            rows = merge_stages(**_stages(rows), packed=_measured(origin, load(folder)))
        base = str(origin.spec.file or origin.spec.name)
        facts = card_facts(
            self._config.out, base, self._commands, origin.compressor, rows, self.tokenizer, self._rule, origin.options
        )
        measured = "The last column is this folder's own figure." if self._config.measure else self._measured_before
        return dataclasses.replace(facts, measured_as=facts.measured_as + measured)


def _measured(origin: Origin, model: PreTrainedModel) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(origin.spec)
    evaluation, model_config = origin.evaluation, load_config(origin.spec)
    data = build_data(origin.data, tokenizer, origin.seed, model_config) if evaluation.validation_split else None
    streams = token_streams(evaluation, tokenizer, data)
    if data is not None:
        print_warnings(sharing(shared_documents(evaluation, data))["warnings"], Console(stderr=True))
    return measure(model, tokenizer, streams, evaluation, "Exported model")


def _stages(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Merged rows taken apart again, by stage."""
    todays = [with_todays_names(row) for row in rows]
    return {stage: [{**row, "perplexity": row[stage]} for row in todays if stage in row] for stage in HEADINGS}
