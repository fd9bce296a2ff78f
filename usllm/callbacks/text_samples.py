"""What the sketched model writes, from the same prompts again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from usllm.callbacks.inspection import Inspection
from usllm.loggers import log_table
from usllm.system.errors import UserError
from usllm.system.frames import with_room
from usllm.system.modes import evaluating
from usllm.training.module import SketchFinetuner

COLUMNS = ("step", "prompt", "continuation")


class TextSamples(Inspection):
    """Logs ``samples``, a table of the continuations that the model chose at each look so far.

    Decoding is greedy, so that two looks differ by what the model has learnt and by nothing else. The model's mode is
    put back, and so are the generators of random numbers: a run with samples is the run without, bit for bit. Samples
    are part of checkpoints; a resumed run logs those of its earlier parts too.

    Args:
        prompts: texts to be continued, one or more.
        max_new_tokens: tokens per continuation, 1 or more.
        every_n_validations: as for :class:`Inspection`.
        side_by_side: whether ``usllm-train`` also prints, at its end, what the dense and the finished model write.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        every_n_validations: int = 1,
        side_by_side: bool = False,
    ) -> None:
        super().__init__(every_n_validations)
        if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise UserError(
                f"callbacks.text_samples.prompts={list(prompts)}: give one text or more, none of them empty"
            )
        if max_new_tokens < 1:
            raise UserError(f"callbacks.text_samples.max_new_tokens={max_new_tokens}: must be 1 or more")
        self.prompts = tuple(prompts)
        self.max_new_tokens, self.side_by_side = max_new_tokens, side_by_side
        self.rows: list[list[Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Samples so far."""
        return {**super().state_dict(), "rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the table."""
        super().load_state_dict(state_dict)
        self.rows = [list(row) for row in state_dict["rows"]]

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Write and log."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
        with trainer.precision_plugin.forward_context():
            texts = continuations(module.network, tokenizer, self.prompts, self.max_new_tokens, module.device)
        self.rows += [[step, prompt, text] for prompt, text in zip(self.prompts, texts, strict=True)]
        log_table(trainer.loggers, "samples", COLUMNS, self.rows, step)


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, device: torch.device
) -> list[str]:
    """The greedy continuation of each prompt by itself, without the prompt; the model's mode is left as it was.

    Args:
        model: a ``PreTrainedModel``.
        tokenizer: its tokenizer.
        max_new_tokens: an end-of-text token ends a text earlier.
        device: where the model computes.
    """
    texts = []
    room = getattr(model.config, "max_position_embeddings", None)
    with evaluating(model):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
            if room is not None:
                ids = ids[:, -max(room - max_new_tokens, 1) :]
            written = with_room(model.generate)(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
