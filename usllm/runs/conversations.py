"""What a run on conversations says where its model lets one see another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usllm.data.batches import model_inputs
from usllm.data.datamodule import TextDataModule
from usllm.models.conversations import kept_apart
from usllm.stages.blocks import run_block
from usllm.stages.stored_blocks import StoredBlocks
from usllm.system.modes import evaluating
from usllm.system.ranks import ranks
from usllm.system.stage_names import DENSE


class ConversationsApart:
    """Looks at the dense model of a run once; nothing where no text is of conversations.

    Args:
        data: of the run.
    """

    def __init__(self, data: TextDataModule) -> None:
        sources = (data.train_source, data.validation_source, *data.mixture.values())
        self.wanted = any(source is not None and source.messages_field is not None for source in sources)

    def observe(self, stage: str, model: nn.Module) -> None:
        """Warn when the stages of a run begin."""
        if stage != DENSE or not self.wanted:
            return
        device = next(model.parameters()).device

        def forward(batch: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = model(**model_inputs(batch, device), use_cache=False).logits
            return logits

        with evaluating(model):
            _warn(kept_apart(forward, _tokens(model)), model)

    def observe_blocks(self, source: StoredBlocks) -> None:
        """Warn where the first block of a model that is not held does not keep conversations apart."""
        if not self.wanted:
            return

        def forward(batch: Mapping[str, Tensor]) -> Tensor:
            context = torch.no_grad
            stream, arguments = source.captured([dict(batch)], context, as_computed=False)
            return run_block(source.dense(0), stream, arguments[0], len(stream), context)

        model = source.around.model
        _warn(kept_apart(forward, _tokens(model)), model)


def _tokens(model: nn.Module) -> int:
    return int(cast(PreTrainedModel, model).config.get_text_config().vocab_size)


def _warn(apart: bool, model: nn.Module) -> None:
    if not apart and ranks().rank == 0:
        warnings.warn(
            f"{type(model).__name__} does not keep apart conversations that lie side by side in a sequence: each sees "
            "those before it, behind the marks of its chat template",
            stacklevel=2,
        )
