"""A model whose weights stay on disk: what stands around its blocks can be run, and blocks are made when asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from usllm.models.stored_weights import StoredWeights
from usllm.system.errors import UserError

_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Keys of configurations of families that change logits behind the head."""


def hollow_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration in evaluation mode, its parameters on the meta device, its buffers real."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # which the line above has undone
    return model.eval()


def filled(module: nn.Module, prefix: str, weights: StoredWeights, device: torch.device) -> nn.Module:
    """A copy of a part of a hollow model with its weights, fp32.

    Args:
        module: The part.
        prefix: Its name in the model.
        weights: Of the model.
        device: Where to.
    """
    found = copy.deepcopy(module)
    for name, parameter in list(found.named_parameters()):
        owner, last = _owner(found, name)
        values = weights[f"{prefix}.{name}"].to(device=device, dtype=torch.float32, copy=True)
        setattr(owner, last, nn.Parameter(values, parameter.requires_grad))
    for name, buffer in list(found.named_buffers()):
        if f"{prefix}.{name}" in weights:
            buffer = weights[f"{prefix}.{name}"].to(device=device, dtype=buffer.dtype, copy=True)
        owner, last = _owner(found, name)
        owner._buffers[last] = buffer.to(device)
    return found


class StoredEmbedding(nn.Module):
    """An embedding that reads the rows of its tokens from disk.

    Args:
        embedding: Of a hollow model; a family's own kind does what it does besides.
        weights: Of the model.
        name: Of its weight [vocabulary, width] among them.
    """

    def __init__(self, embedding: Any, weights: StoredWeights, name: str) -> None:
        super().__init__()
        self.inner = embedding
        embedding.padding_idx = None  # of gradients alone; it would be a row of those that were not read
        self._weights, self._name = weights, name

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states [..., width] of tokens [...], fp32."""
        tokens, places = input_ids.unique(return_inverse=True)
        rows = self._weights[self._name][tokens.cpu()].to(device=input_ids.device, dtype=torch.float32)
        found: Tensor = functional_call(self.inner, {"weight": rows}, (places,))
        return found


class _Reached(Exception):
    """The first block was reached; with what it gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Surroundings:
    """What a decoder computes before its first block and after its last one, of a hollow model.

    Args:
        model: A hollow model; it is changed, and its blocks are told apart from the rest by ``blocks``.
        blocks: Its blocks.
        weights: Of the model.
        device: Where it computes.

    Raises:
        UserError: Its logits are not what its head gives, so that they cannot be had in parts.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[nn.Module], weights: StoredWeights, device: torch.device
    ) -> None:
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or any(
            getattr(model.config, key, None) not in (None, 1, 1.0) for key in _AFTER_THE_HEAD
        ):
            raise UserError(
                f"block_by_block=true: {type(model).__name__} changes its logits behind the head; leave it out"
            )
        self.model, self.blocks, self.weights, self.device = model, list(blocks), weights, device
        self.head: Any = head
        self._in_tuple = False
        self.head_name = next(name for name, module in model.named_modules() if module is head)
        self._fill(model.get_input_embeddings())

    def _fill(self, embedding: Any) -> None:
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for name, module in list(self.model.named_modules()):
            if id(module) in inside or module is self.head:
                continue
            for key, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[key] = buffer.to(self.device)
            if module is embedding:
                self.model.set_submodule(name, StoredEmbedding(embedding, self.weights, f"{name}.weight"))
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{key}" if name else key
                values = self.weights[full].to(device=self.device, dtype=torch.float32, copy=True)
                setattr(module, key, nn.Parameter(values, parameter.requires_grad))

    @torch.no_grad()
    def look_at(self, block: nn.Module) -> None:
        """Find out how blocks of this family give their output: alone, or as the first of several.

        Args:
            block: The first one, with its weights.
        """

        def first(*args: Any, **kwargs: Any) -> None:
            raise _Reached(block(*args, **kwargs))

        self.blocks[0].forward = first
        try:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        except _Reached as reached:
            self._in_tuple = isinstance(reached.output, tuple)
        finally:
            del self.blocks[0].forward

    @contextmanager
    def passing(self, last: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Let hidden states pass through the blocks as they are, in forward passes of the model.

        Args:
            last: From what reaches the last block to what is to leave it; ``None`` hands it on.

        Yields:
            What the head was given in each pass, [sequences, context, hidden].
        """
        found: list[Tensor] = []

        def through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self._in_tuple else hidden_states

        def through_last(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return through(hidden_states if last is None else last(hidden_states))

        def head(hidden: Tensor) -> Tensor:
            found.append(hidden)
            return hidden[..., :1]  # families look at its type

        for block in self.blocks:
            block.forward = through
        self.blocks[-1].forward, self.head.forward = through_last, head
        try:
            yield found
        finally:
            for module in (*self.blocks, self.head):
                del module.forward  # the class's own again

    @torch.no_grad()
    def before_head(self, tokens: Tensor, stream: Tensor) -> Tensor:
        """What the head is given, [sequences, context, hidden].

        Args:
            tokens: int64 [sequences, context].
            stream: Behind the last block, [sequences, context, hidden].
        """
        with self.passing(lambda _: stream.to(self.device)) as found:
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        return found[0]

    def head_rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A part of the head: weight [rows, hidden] fp32, and bias [rows] where it has one, fp32."""
        found = [self.weights[f"{self.head_name}.weight"][rows]]
        if self.head.bias is not None:
            found.append(self.weights[f"{self.head_name}.bias"][rows])
        weight, *bias = (tensor.to(device=self.device, dtype=torch.float32) for tensor in found)
        return weight, bias[0] if bias else None


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
