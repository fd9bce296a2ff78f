"""The seam: what a compression method is, so that everything above it works with every method.

Two objects make a method. A :class:`Compressor` is one method with its configuration; it plans layers, restores plans
from checkpoints and reads them from bytes. A :class:`LayerPlan` is all that compressing one layer takes, and does it.
Both are pure: tensors that belong to a model (latents, states) are handed to them and returned by them, and stay in
:class:`usllm.compress.layer.CompressedLinear`.

*Format* gives stored bytes their meaning: it is stored with the model, hashed, exact and versioned. *Options* say how a
plan came about: they are stored as provenance, and unknown ones are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from usllm.compress.straight_through import straight_through
from usllm.compress.values import Encoded, Fact, Spec, Statistics, compute_dtype

if TYPE_CHECKING:  # kernels are loaded with the first method that has some
    from usllm.compress.expanded import Expanded


class LayerPlan(ABC):
    """Everything needed to compress one layer.

    Attributes:
        name: Stable layer name.
        shape: ``(out, in)`` of the weight.
        stored_states: Whether states are kept as buffers and change only in re-projections; if not, they are computed
            from the latents in each forward pass.
        decodes_on: Kinds of devices on which forward passes multiply a decoded weight, kept by the layer or not;
            elsewhere they do where states are stored and the layer keeps it. Otherwise, and where there is none,
            :meth:`linear` finds its own way.
    """

    name: str
    shape: tuple[int, int]
    stored_states: ClassVar[bool] = False
    decodes_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})

    @property
    @abstractmethod
    def compressor(self) -> Compressor:
        """The method and configuration that the plan belongs to."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The plan itself for a checkpoint: tensors only (:meth:`Compressor.restore` reads them)."""

    def multiplies_decoded(self, device: str, *, kept: bool) -> bool:
        """Whether forward passes multiply a decoded weight on a kind of device.

        Args:
            device: Such as ``cuda``.
            kept: Whether one that stored states decode to is kept, so that it is there anyway.
        """
        return device in self.decodes_on or (kept and self.stored_states and bool(self.decodes_on))

    def latent_specs(self) -> dict[str, Spec]:
        """The parameters that carry the layer through training, known before anything is loaded.

        A single latent of the weight's own shape is called ``weight``: checkpoints name it as the dense model does.
        """
        return {"weight": Spec(self.shape, torch.float32, "latent")}

    @abstractmethod
    def state_specs(self) -> dict[str, Spec]:
        """The states, named as :meth:`encode` returns them."""

    def start(self, weight: Tensor, statistics: Statistics) -> dict[str, Tensor]:
        """Latents to begin with, fp32, from the dense weight [out, in]."""
        return {"weight": weight}

    @abstractmethod
    def encode(
        self,
        latents: Mapping[str, Tensor],
        energy: Tensor | None = None,
        *,
        decode_dtype: torch.dtype | None = None,
        before: Mapping[str, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Encoded:
        """States of latents, in one pass.

        Args:
            latents: As :meth:`latent_specs` names them, whole.
            energy: E[a²] per input channel, [in], the one statistic that a layer keeps; ``None`` takes all as equal.
            decode_dtype: Also give the decoded weight, in this type.
            before: States of the pass before, if there was one.
            memory: Of the pass before.
        """

    def recall(self, latents: Mapping[str, Tensor], energy: Tensor | None = None) -> Tensor | None:
        """The memory that a pass over these latents leaves, when their states are known already: for a resumed run."""
        return None

    @abstractmethod
    def decode(self, states: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Decoded weight [out, in], computed in fp32 and rounded to ``dtype``, on the device of the states."""

    def decode_latents(
        self, latents: Mapping[str, Tensor], energy: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Decoded weight [out, in] of the states of latents, the same bits as by way of the states.

        Training calls it once after each step of a method without stored states; a method overrides it where what the
        states are packed for, or the account of what changed, can be left out.
        """
        return self.decode(self.encode(latents, energy).states, dtype)

    def linear(
        self,
        x: Tensor,
        states: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        decoded: Tensor | None = None,
    ) -> Tensor:
        """``y = x Ŵᵀ + b``, with gradients to ``latents``; from the states alone where there are no latents.

        Args:
            x: [..., in].
            states: Empty where they are to be computed from the latents.
            latents: Empty for a packed layer.
            bias: [out].
            decoded: The decoded weight in the type that is computed with, where the layer has it.
        """
        if decoded is None:
            dtype = compute_dtype(x)
            with torch.no_grad():
                decoded = self.decode(states, dtype) if states else self.decode_latents(latents, None, dtype)
        weight = straight_through(latents["weight"], decoded) if latents else decoded
        return functional.linear(x, weight, bias)

    def expanded_bytes(self) -> int | None:
        """Memory of the layer's codes in output order; ``None`` where the method has no such layout for it."""
        return None

    def expand(self, states: Mapping[str, Tensor]) -> Expanded:
        """The layer's codes in output order, on the device of the states.

        Raises:
            NotImplementedError: :meth:`expanded_bytes` is ``None``.
        """
        raise NotImplementedError(f"{self.name}: there is no expanded layout")

    @property
    def spreads(self) -> bool:
        """Whether :meth:`spread` has anything to do."""
        return False

    def spread_(self, gradients: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Straight-through gradients of the latents, whole, become what the optimizer sees; linear in them, in place.

        It is done once for each optimizer step, with gradients that are summed over micro batches and ranks.
        """

    @abstractmethod
    def pack(self, states: Mapping[str, Tensor]) -> Tensor:
        """The layer as it is stored, uint8 [``total_bits / 8``], on the CPU."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """States of a stored layer that was read, on its device; views where bytes allow it."""

    @abstractmethod
    def sections(self) -> dict[str, int]:
        """Bits of each section of the stored layer, to the last one."""

    @property
    def total_bits(self) -> int:
        """Bits of the stored layer, padding and metadata included."""
        return sum(self.sections().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the stored layer."""
        return self.total_bits / (self.shape[0] * self.shape[1])

    def facts(self) -> dict[str, Fact]:
        """Figures for reports, by name."""
        return {}

    def channel_rates(self) -> Tensor | None:
        """Bits per weight of each input channel, float64 [in], for pictures; ``None`` where all store alike."""
        return None

    def normalised_codes(self, states: Mapping[str, Tensor]) -> Tensor | None:
        """Codes over the largest of their width, fp32 in [-1, 1], for histograms; ``None`` where there are none."""
        return None


class Compressor(ABC):
    """One method and its configuration.

    Attributes:
        method: The method's name: the choice in conf, the tag in checkpoints and ``quantization_config``.
        version: Of what the method stores; another one is refused.
        needs: Statistics that planning and starting read besides the shape: ``energy``, ``covariance``, ``gradient``.
        later_options: Options that the method did not always have, with the values that leave results as they were: at
            these a run that older code has begun goes on with what it has kept.
        options: The configuration, a frozen dataclass with ``bits_per_weight`` and ``layer_budget`` among its fields.
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    later_options: ClassVar[Mapping[str, Any]] = {}
    Options: ClassVar[type[Any]]
    options: Any

    def __init__(self, options: Any) -> None:
        self.options = options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compressor) and (self.method, self.options) == (other.method, other.options)

    def __hash__(self) -> int:
        return hash((self.method, self.options))

    @property
    @abstractmethod
    def format(self) -> dict[str, Any]:
        """What gives stored bytes their meaning, in JSON types."""

    @classmethod
    @abstractmethod
    def from_format(cls, stored: Mapping[str, Any], options: Mapping[str, Any]) -> Compressor:
        """The compressor of a stored model.

        Args:
            stored: Its :attr:`format`; every key must be known.
            options: What is said of how it was made; unknown keys are passed over.

        Raises:
            ValueError: A key of the format is missing, unknown or impossible; it is named.
        """

    @abstractmethod
    def least_bits(self, shape: tuple[int, int]) -> int:
        """Fewest bits that a layer ``(out, in)`` can be stored in."""

    @abstractmethod
    def most_bits(self, shape: tuple[int, int]) -> int:
        """Most bits that a layer ``(out, in)`` can make use of."""

    @abstractmethod
    def plan(self, shape: tuple[int, int], name: str, statistics: Statistics, bits: int) -> LayerPlan:
        """Plan of a layer under a ceiling on all that it stores; never touches the weight, which may be sharded.

        Raises:
            ValueError: The ceiling is too low; names the least rate that works.
        """

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> LayerPlan:
        """A plan from :meth:`LayerPlan.to_tensors`."""

    @abstractmethod
    def read(self, packed: Tensor, shape: tuple[int, int], name: str) -> LayerPlan:
        """A plan from a stored layer, uint8 [bytes], every byte of it checked: it may come from a stranger.

        Raises:
            PackedFormatError: The bytes are not a layer of this shape.
        """

    @abstractmethod
    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Fewest and most bytes that a stored layer of this shape can have; asked before anything is read."""

    def problems(self) -> list[str]:
        """What only a look at several options together shows, one line each with key, value and way out."""
        return []
