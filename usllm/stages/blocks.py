"""A decoder's blocks, and the streams of hidden states that run through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from usllm.compress.values import compute_dtype
from usllm.data.batches import model_inputs
from usllm.stages.block_arguments import Arguments, OfPositions, same_for_all
from usllm.system.errors import UserError

Room = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a tensor of a shape and a type, not filled, where streams are to live."""


class _Reached(Exception):
    """The first block was reached: what comes after it need not be computed."""


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks, those parts that transformers calls indivisible, in their order.

    Raises:
        UserError: The model does not say which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(f"{type(model).__name__} does not name its decoder blocks: leave stages.reconstruct out")
    return found


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    room: Room | None = None,
    as_computed: bool = True,
) -> tuple[Tensor, list[Arguments]]:
    """The stream that enters the first block, and what each block is called with besides it.

    Args:
        model: A causal language model.
        blocks: Its blocks.
        batches: Of equal shape, ``input_ids`` int64 [sequences, context]; also ``position_ids`` where conversations lie
            side by side.
        device: Where the model is.
        room: Where the stream is to live; ``None``: on the device.
        as_computed: In the type that is computed with: blocks read the stream in it, and streams are the largest thing
            that is held. Otherwise in that of the hidden states.

    Returns:
        Hidden states of all batches, [sequences, context, hidden], and the keyword arguments of each block, which are
        the same for all batches of one shape where these have no positions of their own.
    """
    stream: list[Tensor] = []
    like: list[Tensor] = []  # of the hidden states, which the stream may have another type than
    arguments: list[dict[str, Any]] = [{} for _ in blocks]
    size, in_tuple = len(batches[0]["input_ids"]), False
    total, done = sum(len(batch["input_ids"]) for batch in batches), 0

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        hidden = args[0] if args else kwargs["hidden_states"]
        if not stream:
            like.append(hidden[:1, :1])
            dtype = compute_dtype(hidden) if as_computed else hidden.dtype
            shape = (total, *hidden.shape[1:])
            stream.append(torch.empty(shape, dtype=dtype, device=device) if room is None else room(shape, dtype))
        stream[0][done : done + len(hidden)] = hidden
        done += len(hidden)
        raise _Reached

    def remember(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(isinstance(value, Tensor) for value in args[1:]):
                raise UserError(
                    f"{type(module).__name__}: is given masks by their place, not by name: leave stages.reconstruct out"
                )
            arguments[number] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return hook

    def look(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)

    handles = [
        block.register_forward_pre_hook(remember(number), with_kwargs=True) for number, block in enumerate(blocks)
    ]
    handles.append(blocks[0].register_forward_hook(look))
    try:
        model(**model_inputs(batches[0], device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    handle = blocks[0].register_forward_pre_hook(first, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(**model_inputs(batch, device), use_cache=False)
            except _Reached:
                continue
    finally:
        handle.remove()
    if "position_ids" not in batches[0]:
        return stream[0], [same_for_all(each, size) for each in arguments]
    positions = torch.cat([batch["position_ids"] for batch in batches])
    of_positions = OfPositions(model, blocks, positions, like[0], in_tuple)
    return stream[0], [of_positions.block(number) for number in range(len(blocks))]


def run_block(
    block: nn.Module,
    stream: Tensor,
    arguments: Arguments,
    batch_size: int,
    context: Callable[[], AbstractContextManager[Any]],
    after: Tensor | None = None,
) -> Tensor:
    """The stream after a block, like the one before it.

    Args:
        block: A decoder block.
        stream: Before it, [sequences, context, hidden], wherever it lives.
        arguments: From :func:`capture`.
        batch_size: Sequences of a forward pass; a divisor of their number.
        context: Makes the context of the forward pass.
        after: What is filled, of the shape of the stream; the stream itself where it is needed no more. ``None`` makes
            one beside it.
    """
    after = torch.empty_like(stream) if after is None else after
    for part, output in outputs(block, stream, arguments, batch_size, context):
        after[part] = output
    return after


@torch.no_grad()
def outputs(
    block: nn.Module,
    stream: Tensor,
    arguments: Arguments,
    batch_size: int,
    context: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[slice, Tensor]]:
    """Places in a stream and what a block makes of them, batch by batch; arguments as for :func:`run_block`."""
    device = next(block.parameters(), stream).device
    for first in range(0, len(stream), batch_size):
        part = slice(first, first + batch_size)
        with context():
            found = output_of(block, stream[part].to(device), arguments(part))
        yield part, found


def output_of(block: nn.Module, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Hidden states behind a block, [sequences, context, hidden]; some blocks give them as the first of several.

    Args:
        block: A decoder block.
        stream: Hidden states before it, of the same shape.
        arguments: What it is called with besides.
    """
    output = block(stream, **arguments)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
