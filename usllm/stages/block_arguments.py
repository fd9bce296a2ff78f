"""What blocks of a decoder are called with besides hidden states: masks, and the angles of their positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Sequences = slice | Tensor
"""Numbers of sequences of a text, in the order in which a batch holds them."""
Arguments = Callable[[Sequences], dict[str, Any]]
"""Keyword arguments of a block for some sequences."""


def same_for_all(arguments: dict[str, Any], batch_size: int) -> Arguments:
    """Arguments that do not depend on which sequences they are for, as those of plain text.

    Args:
        arguments: For a batch; of tensors that have a place for each sequence (masks, of some families) as many places
            are taken as sequences are asked for.
        batch_size: Sequences of that batch.
    """

    def of(sequences: Sequences) -> dict[str, Any]:
        count = len(range(batch_size)[: _count(sequences)])

        def cut(value: Any) -> Any:
            each = isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch_size > 1
            return value[:count] if each else value

        return {name: cut(value) for name, value in arguments.items()}

    return of


class OfPositions:
    """Arguments of texts whose positions restart in places of their own: the model is asked for those of each batch.

    Args:
        model: That the blocks are of.
        blocks: Whose arguments they are.
        position_ids: Of the whole text, int64 [sequences, context].
        like: Hidden states as they enter the first block, of any number of sequences and places.
        in_tuple: Whether blocks give their output as the first of several.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], position_ids: Tensor, like: Tensor, in_tuple: bool
    ) -> None:
        self._model: nn.Module = getattr(model, "base_model", model)  # the head's logits are the largest part
        self._blocks, self._positions, self._in_tuple = blocks, position_ids, in_tuple
        self._like = like[:0, :0].clone()
        self._known: tuple[list[int], list[dict[str, Any]]] = ([], [])  # blocks of a window ask for the same ones

    def block(self, number: int) -> Arguments:
        """The arguments of one block."""
        return lambda sequences: self._all(sequences)[number]

    @torch.no_grad()
    def _all(self, sequences: Sequences) -> list[dict[str, Any]]:
        asked = torch.arange(len(self._positions))[sequences].tolist()
        if self._known[0] == asked:
            return self._known[1]
        found: list[dict[str, Any]] = [{} for _ in self._blocks]

        def seen(number: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                found[number] = kwargs
                return (hidden_states,) if self._in_tuple else hidden_states

            return forward

        positions = self._positions[asked].to(self._like.device)
        empty = self._like.new_zeros(*positions.shape, self._like.shape[-1])
        for number, block in enumerate(self._blocks):
            block.forward = seen(number)
        try:
            self._model(inputs_embeds=empty, position_ids=positions, use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward  # the class's own again
        self._known = asked, found
        return found


def _count(sequences: Sequences) -> int | None:
    if isinstance(sequences, Tensor):
        return len(sequences)
    return None if sequences.stop is None else sequences.stop - (sequences.start or 0)
