"""Which of a decoder's linear weights are compressed, which are left out, and which patterns matched nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from usllm.compress.layer import CompressedLinear
from usllm.compress.surgery import POLICY, matches

LEAST_SHARE = 0.9
"""Below this share of the decoder's linear weights a warning names what is left out."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that some models store as one. The default patterns name both forms: one of them matches nothing."""


@dataclass(frozen=True)
class Coverage:
    """What the patterns of a run cover.

    Attributes:
        layers: number of layers compressed.
        compressed_weights: weights in them, without those of an output head.
        linear_weights: weights of all linear layers and experts of the decoder; embeddings, norms and the output head
            are none of them.
        left_out: last part of a name to (number of layers, weights) of what is not compressed, most weights first.
            Experts stored as one parameter ``[experts, out, in]`` come with their shape.
        unmatched: patterns that matched nothing, but for the other form of a projection that is fused or apart.
        linear: those of ``left_out`` that patterns could name.
    """

    layers: int
    compressed_weights: int
    linear_weights: int
    left_out: dict[str, tuple[int, int]]
    unmatched: tuple[str, ...]
    linear: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Compressed share of the linear weights."""
        return self.compressed_weights / self.linear_weights if self.linear_weights else 1.0

    def line(self) -> str:
        """What is compressed, in one line."""
        text = f"{self.layers} layers, {self.share:.1%} of the decoder's linear weights"
        return text + (f"; left out: {self._names()}" if self.left_out else "")

    def warnings(self) -> list[str]:
        """What a user most likely did not mean, with the way out; one line each."""
        found = []
        if self.unmatched:
            found.append(f"model.patterns: {', '.join(self.unmatched)} matched no layer of this model")
        if self.share < LEAST_SHARE:
            found.append(
                f"only {self.share:.1%} of the decoder's linear weights are compressed; left out: {self._names()}. "
                f"{self._way_out()}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        plain = asdict(self)
        plain["left_out"] = {name: list(counts) for name, counts in self.left_out.items()}
        plain |= {"unmatched": list(self.unmatched), "linear": list(self.linear), "share": self.share}
        return plain

    def _way_out(self) -> str:
        names = [name for name in self.left_out if name in self.linear]
        add = f"Add to model.patterns: {', '.join(names)}" if names else "Nothing more can be compressed"
        return add + ("; the others are no linear layers" if names and len(names) < len(self.left_out) else "")

    def _names(self) -> str:
        return ", ".join(f"{name} ({count} x)" for name, (count, _) in self.left_out.items())


def coverage(model: nn.Module, patterns: Iterable[str], compressed: Collection[str] | None = None) -> Coverage:
    """Coverage of a decoder by patterns, before or after surgery; the tensors may be on the meta device.

    Args:
        model: the whole model; its ``get_output_embeddings``, where it has one, tells the head apart.
        patterns: as for :func:`usllm.compress.swap_linears_`.
        compressed: names of the layers that are compressed; ``None``: those that match.
    """
    patterns = tuple(patterns)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    kinds: tuple[type[nn.Module], ...] = (*POLICY, CompressedLinear)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    chosen = {name for name in linear if matches(name, patterns)} if compressed is None else set(compressed)
    weights = {name: _weights(module) for name, module in linear.items() if module is not head}
    left_out = Counter({name: count for name, count in weights.items() if name not in chosen})
    left_out.update(_other_matrices(model, (*kinds, nn.Embedding), head))
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for name, size in left_out.items():
        counts[stem := _stem(name)] += 1
        sums[stem] += size
    covered = sum(size for name, size in weights.items() if name in chosen)
    matched = {pattern for pattern in patterns if any(matches(name, (pattern,)) for name in chosen)}
    return Coverage(
        layers=len(chosen),
        compressed_weights=covered,
        linear_weights=covered + sum(left_out.values()),
        left_out={name: (counts[name], size) for name, size in sums.most_common()},
        unmatched=tuple(p for p in patterns if p not in matched and not _other_form(p, matched)),
        linear=tuple(sorted({_stem(name) for name in weights if name not in chosen})),
    )


def _weights(module: nn.Module) -> int:
    """Weights of a linear layer; of a compressed one, whose latents may be factors, those of its matrix."""
    return int(module.out_features) * int(module.in_features)  # type: ignore[arg-type]


def _other_matrices(model: nn.Module, known: tuple[type, ...], head: nn.Module | None) -> dict[str, int]:
    """Matrices of modules that surgery does not know (experts in one parameter, GPT-2's ``Conv1D``): name to size."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {}
    for place, module in model.named_modules():
        if isinstance(module, (*known, *convolutions)) or module is head:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                what = f" {list(parameter.shape)}" if parameter.ndim == 3 else ""
                found[f"{place}.{name}{what}"] = parameter.numel()
    return found


def _stem(name: str) -> str:
    """The part of a layer's name that its kind shares; a parameter keeps its module's."""
    parts, _, shape = name.partition(" [")
    last = parts.rpartition(".")[2]
    if shape or last in ("weight", "bias"):
        last = ".".join(parts.split(".")[-2:])
    return f"{last} [{shape}" if shape else last


def _other_form(pattern: str, matched: Collection[str]) -> bool:
    """Whether a projection called ``pattern`` is there in its fused form, or in its parts."""
    if pattern in _FUSED:
        return any(part in matched for part in _FUSED[pattern])
    return any(pattern in parts and fused in matched for fused, parts in _FUSED.items())
