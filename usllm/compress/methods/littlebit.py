"""Binary low-rank factors as a method: ``y = h ∘ (sign(U) (l ∘ (sign(V)ᵀ (g ∘ x))))``, one such path or two."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.expanded import Expanded, ExpandedFactors, sign_planes
from usllm.compress.packed_bytes import PackedBytes, half_bytes, half_view
from usllm.compress.values import Encoded, Fact, Spec, Statistics, compute_dtype
from usllm.littlebit import LittleBitConfig
from usllm.littlebit.dual_svid import Path, dual_svid
from usllm.littlebit.factors import scaled, scaled_signs, stored_scale
from usllm.sketch.bitstream import pack, unpack
from usllm.system.errors import UserError
from usllm_kernels.planes import SIGNS, planes_bytes

HEADER_BYTES = 4
_SIGNS, _SCALES = ("u", "v"), ("h", "l", "g")


class LittleBitPlan(LayerPlan):
    """Rank and paths of one layer; latents and scales of path ``p`` are called ``u_p``, ``v_p``, ``h_p``, ``l_p``,
    ``g_p``, and so are the states that follow them: sign bits, uint8 [bytes], and fp16 scales.
    """

    decodes_on: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, name: str, shape: tuple[int, int], config: LittleBitConfig, rank: int, paths: int) -> None:
        self.name, self.shape, self.config, self.rank, self.paths = name, shape, config, rank, paths

    @property
    def compressor(self) -> LittleBitCompressor:
        return LittleBitCompressor(self.config)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"rank": torch.tensor(self.rank), "paths": torch.tensor(self.paths)}

    def _lengths(self) -> dict[str, int]:
        """Rows of ``u`` and ``v``, entries of the scales."""
        out, inputs = self.shape
        return {"u": out, "v": inputs, "h": out, "l": self.rank, "g": inputs}

    def latent_specs(self) -> dict[str, Spec]:
        lengths = self._lengths()
        specs = {}
        for path in range(self.paths):
            for key in _SIGNS:
                specs[f"{key}_{path}"] = Spec((lengths[key], self.rank), torch.float32, "latent")
            for key in _SCALES:
                specs[f"{key}_{path}"] = Spec((lengths[key],), torch.float32, "scale")
        return specs

    def state_specs(self) -> dict[str, Spec]:
        return {
            name: Spec((size // 8,), torch.uint8, "state")
            if name[0] in _SIGNS
            else Spec((size // 16,), torch.half, "state")
            for name, size in self.sections().items()
            if name != "header"
        }

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics) -> dict[str, Tensor]:
        rest = weight.float()
        if not bool(rest.isfinite().all()):
            raise UserError(f"{self.name}: its weights are not finite, they have no factors; check the model's files")
        latents: dict[str, Tensor] = {}
        for path in range(self.paths):
            found = dual_svid(rest, self.rank)
            # What is left for the next path is left by what is stored, not by what was computed.
            rest = (
                rest - found._replace(**{key: stored_scale(getattr(found, key)).float() for key in _SCALES}).product()
            )
            latents |= {f"{key}_{path}": value for key, value in found._asdict().items()}
        return latents

    def encode(
        self,
        latents: Mapping[str, Tensor],
        energy: Tensor | None = None,
        *,
        decode_dtype: torch.dtype | None = None,
        before: Mapping[str, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Encoded:
        states = {}
        for name, latent in latents.items():
            signs = name[0] in _SIGNS
            states[name] = pack([(torch.signbit(latent.detach()), 1)], latent.device) if signs else stored_scale(latent)
        change = torch.zeros((), device=next(iter(states.values())).device)
        if before is not None:
            flips = [(self._bits(states, name) != self._bits(before, name)).flatten() for name in self._sign_names()]
            change = torch.cat(flips).float().mean()
        decoded = None if decode_dtype is None else self.decode(states, decode_dtype)
        return Encoded(states, decoded, change, None, None)

    def decode(self, states: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        left, right = self.factors(states, {}, torch.float32)
        return (left @ right.T).to(dtype)

    def linear(
        self,
        x: Tensor,
        states: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        decoded: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        left, right = self.factors(states, latents, dtype)
        return functional.linear(x.to(dtype) @ right, left, bias)

    def factors(
        self, states: Mapping[str, Tensor], latents: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``F_U`` [out, paths · rank] and ``F_V`` [in, paths · rank] in ``dtype``: the weight is ``F_U F_Vᵀ``.

        Args:
            states: Read where there are no latents.
            latents: Get the gradients.
            dtype: That is computed with.
        """
        lefts, rights = [], []
        for path in range(self.paths):
            u, v, h, l, g = (f"{key}_{path}" for key in Path._fields)  # noqa: E741
            if latents:
                slope = self.config.slope
                lefts.append(scaled_signs(latents[u], latents[h], None, slope, dtype))
                rights.append(scaled_signs(latents[v], latents[g], latents[l], slope, dtype))
            else:
                lefts.append(scaled(self._signs(states, u), states[h], None).to(dtype))
                rights.append(scaled(self._signs(states, v), states[g], states[l]).to(dtype))
        return (lefts[0], rights[0]) if self.paths == 1 else (torch.cat(lefts, 1), torch.cat(rights, 1))

    def expanded_bytes(self) -> int | None:
        out, inputs = self.shape
        return self.paths * (planes_bytes(self.rank, [(inputs, SIGNS)]) + planes_bytes(out, [(self.rank, SIGNS)]))

    def expand(self, states: Mapping[str, Tensor]) -> Expanded:
        paths = []
        for path in range(self.paths):
            u, v, h, l, g = (f"{key}_{path}" for key in Path._fields)  # noqa: E741
            right = sign_planes(self._signs(states, v).t(), states[g], states[l])
            paths.append((right, sign_planes(self._signs(states, u), torch.ones_like(states[l]), states[h])))
        return ExpandedFactors(paths)

    def _sign_names(self) -> Iterator[str]:
        return (f"{key}_{path}" for path in range(self.paths) for key in _SIGNS)

    def _bits(self, states: Mapping[str, Tensor], name: str) -> Tensor:
        """Sign bits, uint8 [rows, rank]; 1 is negative."""
        rows = self._lengths()[name[0]]
        return unpack(states[name], rows * self.rank, 1).view(rows, self.rank)

    def _signs(self, states: Mapping[str, Tensor], name: str) -> Tensor:
        return self._bits(states, name).float().mul_(-2).add_(1)

    def pack(self, states: Mapping[str, Tensor]) -> Tensor:
        parts = [torch.tensor([self.paths, *self.rank.to_bytes(3, "little")], dtype=torch.uint8)]
        for name in self.sections():
            if name != "header":
                state = states[name]
                parts.append(state.detach().cpu() if name[0] in _SIGNS else half_bytes(state))
        return torch.cat(parts)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        states, first = {}, 0
        for name, bits in self.sections().items():
            size = bits // 8
            if name != "header":
                signs = name[0] in _SIGNS
                states[name] = packed[first : first + size] if signs else half_view(packed, first, size // 2)
            first += size
        return states

    def sections(self) -> dict[str, int]:
        return _sections(self.shape, self.rank, self.paths)

    def facts(self) -> dict[str, Fact]:
        return {"rank": Fact(self.rank, drawn=True), "paths": Fact(self.paths)}


class LittleBitCompressor(Compressor):
    """Binary factors with their configuration."""

    method: ClassVar[str] = "littlebit"
    Options: ClassVar[type[Any]] = LittleBitConfig
    options: LittleBitConfig

    @property
    def format(self) -> dict[str, Any]:
        return {}  # rank and paths stand in each layer's header

    @classmethod
    def from_format(cls, stored: Mapping[str, Any], options: Mapping[str, Any]) -> LittleBitCompressor:
        if stored:
            raise ValueError(f"format: the key {min(stored)} is unknown")
        known = {field.name for field in dataclasses.fields(LittleBitConfig)}
        return cls(LittleBitConfig(**{key: value for key, value in options.items() if key in known}))

    def _total_bits(self, shape: tuple[int, int], rank: int, paths: int | None = None) -> int:
        return sum(_sections(shape, rank, paths or self.options.paths).values())

    def least_bits(self, shape: tuple[int, int]) -> int:
        return self._total_bits(shape, 1)

    def most_bits(self, shape: tuple[int, int]) -> int:
        return self._total_bits(shape, min(shape))

    def plan(self, shape: tuple[int, int], name: str, statistics: Statistics, bits: int) -> LittleBitPlan:
        weights, paths = shape[0] * shape[1], self.options.paths
        least, most = self.least_bits(shape), self.most_bits(shape)
        asked = self.options.bits_per_weight
        rate = asked if int(asked * weights) == bits else bits / weights  # a rule over layers gives others
        layer = f"sketch.bits_per_weight={rate:g}: {name} ({shape[0]}x{shape[1]})"
        if bits < least:
            needed, fewer = math.ceil(least / weights * 1e4) / 1e4, " or take sketch.paths=1" if paths > 1 else ""
            raise ValueError(f"{layer} needs {needed:.4f} for rank 1 and its scales; raise it{fewer}")
        if bits > most:
            held, other = math.floor(most / weights * 1e4) / 1e4, " or take sketch.paths=2" if paths < 2 else ""
            raise ValueError(f"{layer} can use no more than {held:.4f}, at rank {min(shape)}; lower it{other}")
        rank = bisect_right(range(1, min(shape) + 1), bits, key=lambda rank: self._total_bits(shape, rank))
        return LittleBitPlan(name, shape, self.options, rank, paths)

    def restore(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> LittleBitPlan:
        rank, paths = int(tensors["rank"]), int(tensors["paths"])
        if not (1 <= rank <= min(shape) and paths in (1, 2)):
            raise UserError(f"{name}: {paths} paths of rank {rank}; the checkpoint is damaged")
        return LittleBitPlan(name, shape, self.options, rank, paths)

    def read(self, packed: Tensor, shape: tuple[int, int], name: str) -> LittleBitPlan:
        read = PackedBytes(packed, shape, name, HEADER_BYTES)
        paths, rank = read.header[0], int.from_bytes(bytes(read.header[1:]), "little")
        if paths not in (1, 2) or not 1 <= rank <= min(shape):
            read.fail(f"its header {read.header} is impossible")
        plan = LittleBitPlan(name, shape, self.options, rank, paths)
        read.check_size(plan.total_bits // 8)
        first = 0
        for section, bits in plan.sections().items():
            last = first + bits // 8
            if section[0] in _SIGNS:
                read.check_padding(last - 1, plan._lengths()[section[0]] * rank)
            elif section != "header":
                read.check_scales(first, bits // 16, signed=True)
            first = last
        return plan

    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self._total_bits(shape, 1, 1) // 8, self._total_bits(shape, min(shape), 2) // 8


def _sections(shape: tuple[int, int], rank: int, paths: int) -> dict[str, int]:
    """Bits of the header, of all paths' fp16 scales, and of all paths' signs with what fills their last bytes.

    Scales come first, so that they are aligned.
    """
    (out, inputs), count = shape, range(paths)
    sizes = {"h": out, "l": rank, "g": inputs}
    scales = {f"{key}_{path}": 16 * sizes[key] for path in count for key in _SCALES}
    rows = {"u": out, "v": inputs}
    return {
        "header": 8 * HEADER_BYTES,
        **scales,
        **{f"{key}_{path}": 8 * -(-rows[key] * rank // 8) for path in count for key in _SIGNS},
    }


COMPRESSOR = LittleBitCompressor
