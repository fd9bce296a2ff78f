"""A plan as an operator of torch takes it: two tensors and a list of whole numbers, no Python object.

The tensors are those that are stored with a model (:meth:`usllm.sketch.Plan.to_tensors`), the numbers its format
constants and a digest. What the kernels read is derived from them once and kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from usllm.sketch import Plan, SketchConfig
from usllm.sketch.classes import ChannelClass
from usllm.sketch.codec import States
from usllm.sketch.hash import HASHES
from usllm.sketch.operators import OPERATORS
from usllm.sketch.plan import living_plan

_OPERATORS, _HASHES = tuple(OPERATORS), tuple(HASHES)
_QUERIES, _ROUNDINGS = ("magnitude_max", "signed_max"), ("toward_zero", "nearest")

_known: WeakValueDictionary[tuple[int, ...], Plan] = WeakValueDictionary()
_rebuilt: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
_MOST_REBUILT = 1024  # plans that no living object stands for: of compiled functions, and of operator calls by hand


class FlatPlan(NamedTuple):
    """What an operator takes for a plan.

    Attributes:
        classes: int32 [classes, 3]: rows, states per group, width.
        channel_class: uint8 [in].
        numbers: Output rows, input channels, states, channels with states, bits of unpacked codes, operator, query,
            hash, rounding, group size, output scale, key, digest.
    """

    classes: Tensor
    channel_class: Tensor
    numbers: list[int]


def flatten(plan: Plan) -> FlatPlan:
    """A plan for an operator call; made once a plan."""
    if torch.compiler.is_dynamo_compiling():
        found = _flat_plan(plan.handle)
        return FlatPlan(found.classes, found.channel_class, found.numbers)  # a constant of torch 2.11 is not unpacked
    kept: FlatPlan | None = plan.__dict__.get("_flat")
    if kept is None:
        kept = plan.__dict__["_flat"] = _flatten(plan)
    _known.setdefault(tuple(kept.numbers), plan)
    return kept


@torch.inference_mode(False)  # a backward pass may save the tensors, whatever made the plan
def _flatten(plan: Plan) -> FlatPlan:
    tensors, config = {name: tensor.clone() for name, tensor in plan.to_tensors().items()}, plan.config
    content = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    numbers = [
        *plan.shape,
        plan.num_states,
        plan.num_scales,
        16 if plan.code_dtype == torch.int16 else 8,
        _OPERATORS.index(config.operator),
        _QUERIES.index(config.query),
        _HASHES.index(config.hash),
        _ROUNDINGS.index(config.rounding),
        config.group_size,
        int(config.output_scale),
        plan.key,
        int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little"),
    ]
    return FlatPlan(tensors["classes"], tensors["channel_class"], numbers)


def unflatten(classes: Tensor, channel_class: Tensor, numbers: list[int]) -> Plan:
    """The plan of an operator call: the one that was flattened, or, in another process, one made anew."""
    key = tuple(numbers)
    found = _known.get(key)
    if found is None and key in _rebuilt:
        _rebuilt.move_to_end(key)
        found = _rebuilt[key]
    if found is None:
        out, width, _, _, _, operator, query, spread, rounding, group, output, hash_key, _ = numbers
        config = SketchConfig(
            operator=_OPERATORS[operator],
            query=_QUERIES[query],
            hash=_HASHES[spread],
            rounding=_ROUNDINGS[rounding],
            group_size=group,
            output_scale=bool(output),
        )
        choices = tuple(ChannelClass(*row) for row in classes.tolist())
        found = Plan("", (out, width), config, choices, channel_class.cpu())
        found.__dict__["key"] = hash_key  # the name is unknown here, and serves for nothing else
        _rebuilt[key] = found
        if len(_rebuilt) > _MOST_REBUILT:
            _rebuilt.popitem(last=False)
    return found


def fake_states(numbers: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes that :func:`list_states` gives for a plan, with nothing in them."""
    out, _, states, channels, bits, _, _, _, _, _, output, _, _ = numbers
    sizes = (channels, 1, out if output else 0, 1 if output else 0)
    codes = torch.empty(states, dtype=torch.int16 if bits == 16 else torch.int8, device=device)
    scales, base, output_scales, output_base = (torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    return codes, scales, base, output_scales, output_base


def list_states(states: States) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States as an operator takes and returns them; what is not there is empty."""
    codes = states["codes"]
    return (
        codes,
        states["scales"],
        states["scale_base"],
        states.get("output_scales", empty(torch.uint8, codes.device)),
        states.get("output_scale_base", empty(torch.uint8, codes.device)),
    )


def check_states(states: States, plan: Plan) -> None:
    """Refuse states that the plan was not made for: kernels read them without looking.

    Raises:
        ValueError: Their number is another, or they do not lie in one piece.
    """
    needed = {"codes": plan.num_states, "scales": plan.num_scales, "scale_base": 1}
    if states["codes"].dtype == torch.uint8:
        needed["codes"] = plan.bit_breakdown()["states"] // 8
    if plan.config.output_scale:
        needed |= {"output_scales": plan.shape[0], "output_scale_base": 1}
    for name, count in needed.items():
        held = states.get(name, states["codes"][:0])
        if held.numel() < count or not held.is_contiguous():
            apart = "" if held.is_contiguous() else ", not in one piece"
            raise ValueError(
                f"{plan.name}: {name} are {held.numel()} numbers{apart}; the plan wants {count} in one piece"
            )


def name_states(tensors: Sequence[Tensor]) -> States:
    """Inverse of :func:`list_states`."""
    names = ("codes", "scales", "scale_base", "output_scales", "output_scale_base")
    held = names if tensors[4].numel() else names[:3]
    return dict(zip(held, tensors, strict=False))


def _flat_plan(handle: str) -> FlatPlan:
    return flatten(living_plan(handle))


def _places(handle: str) -> tuple[int, int, int]:
    """First bytes of scales, output scales and codes in a packed layer."""
    plan = living_plan(handle)
    size = {name: bits // 8 for name, bits in plan.bit_breakdown().items()}
    scales = size["header"] + size["classes"] + size["channel_classes"]
    output = scales + size["scales"]
    return scales, output, output + size["output_scale"]


def packed_states(packed: Tensor, plan: Plan) -> States:
    """States of a packed layer without unpacking them: ``codes`` is the stream itself, uint8.

    Args:
        packed: uint8 [``plan.total_bits / 8``], header first (`usllm/packed/FORMAT.md`).
        plan: The layer's plan.
    """
    scales, output, codes = _places(plan.handle)
    states = {"codes": packed[codes:], "scales": packed[scales:output], "scale_base": packed[1:2]}
    if plan.config.output_scale:
        states |= {"output_scales": packed[output:codes], "output_scale_base": packed[2:3]}
    return states


def empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a tensor that is not there: operators return no ``None``."""
    return torch.empty(0, dtype=dtype, device=device)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (a second, and triton). They
# take a plan's handle: before torch 2.12 no object that is not a constant may go into such a function.
for _function in (_flat_plan, _places):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # functions have no such attribute for mypy
