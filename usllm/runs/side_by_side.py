"""The same prompts continued greedily by the dense and by the finished model, for the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from transformers import PreTrainedTokenizerBase

from usllm.callbacks import TextSamples
from usllm.callbacks.text_samples import continuations
from usllm.system.files import read_json, write_json
from usllm.system.machine import choose_autocast
from usllm.system.ranks import ranks
from usllm.system.rng import preserved_rng
from usllm.system.stage_names import DENSE, FINETUNED

SAMPLES_FILE = "samples.json"


class SideBySide:
    """What the callback ``text_samples`` asks for with ``side_by_side``; nothing without it.

    What the dense model wrote is kept in the run's folder, so that a resumed run has it.

    Args:
        run_dir: Of the run.
        tokenizer: Of the model.
        callbacks: Of the run.
        precision: ``evaluation.precision``, in which both write.
    """

    def __init__(
        self,
        run_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[Callback],
        precision: str = "auto",
    ) -> None:
        found = [each for each in callbacks if isinstance(each, TextSamples) and each.side_by_side]
        self.callback = found[0] if found else None
        self.path = run_dir / SAMPLES_FILE
        self.tokenizer, self.precision = tokenizer, precision

    def observe(self, stage: str, model: nn.Module) -> None:
        """Let the dense model write when the stages of a run begin."""
        if stage == DENSE and self.callback is not None:
            texts = self._written(model)
            if ranks().rank == 0:
                write_json(self.path, dict(zip(self.callback.prompts, texts, strict=True)))

    def rows(self, model: nn.Module) -> list[dict[str, str]]:
        """Prompt, and continuations by both models; by the finished one alone where the dense one's are not known."""
        if self.callback is None:
            return []
        dense = read_json(self.path) or {}
        pairs = zip(self.callback.prompts, self._written(model), strict=True)
        return [{"prompt": prompt, DENSE: str(dense.get(prompt, "")), FINETUNED: text} for prompt, text in pairs]

    def _written(self, model: Any) -> list[str]:
        assert self.callback is not None
        device = next(model.parameters()).device
        autocast = choose_autocast(self.precision, device)
        with preserved_rng(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            return continuations(model, self.tokenizer, self.callback.prompts, self.callback.max_new_tokens, device)
