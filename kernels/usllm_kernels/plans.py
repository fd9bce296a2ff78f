"""A plan as a custom op of torch takes it: lists of tensors and of whole numbers, no Python object.

The tensors are those that are stored with a model (:meth:`usllm.sketch.Plan.to_tensors`) and a description by names,
from which another process makes the plan anew. The numbers are the sizes of the states, and a digest of the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from usllm.sketch import Plan, SketchConfig
from usllm.sketch.codec import States
from usllm.sketch.plan import living_plan
from usllm_kernels.plan_cache import cached_by_plan

_known: WeakValueDictionary[tuple[int, ...], Plan] = WeakValueDictionary()
_rebuilt: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
_MOST_REBUILT = (
    1024  # plans that no living object stands for: of compiled functions, and of calls of custom ops by hand
)
_STATES = ("codes", "scales", "scale_base", "output_scales", "output_scale_base")  # the last two where asked for


class PlanNumbers(NamedTuple):
    """The whole numbers of a plan; a custom op takes them as a list in this order.

    Attributes:
        out_features, in_features: Of the weight.
        num_states: Of the layer.
        num_active: Channels that hold states.
        code_bits: Width of unpacked codes, 8 or 16.
        output_scale: Whether outputs have scales, 0 or 1.
        digest: Of the plan's tensors, 56 bits.
    """

    out_features: int
    in_features: int
    num_states: int
    num_active: int
    code_bits: int
    output_scale: int
    digest: int


class FlatPlan(NamedTuple):
    """What a custom op takes for a plan.

    Attributes:
        tensors: ``classes``, int32 [classes, 3]: rows, states per group, width; ``channel_class``, uint8 [in]; a
            description, uint8 [bytes]: name and configuration as JSON.
        numbers: Of :class:`PlanNumbers`.
    """

    tensors: list[Tensor]
    numbers: list[int]


def flatten(plan: Plan) -> FlatPlan:
    """A plan for the call of a custom op; made once a plan."""
    if torch.compiler.is_dynamo_compiling():
        found = _flat_plan(plan.handle)
        return FlatPlan(found.tensors, found.numbers)  # a constant of torch 2.11 is not unpacked
    flat = _flatten(plan)
    _known[tuple(flat.numbers)] = plan  # the very one: another of equal content may be gone before it, with its tables
    return flat


@cached_by_plan
@torch.inference_mode(False)  # a backward pass may save the tensors, whatever made the plan
def _flatten(plan: Plan) -> FlatPlan:
    stored = plan.to_tensors()
    description = json.dumps({"name": plan.name, "config": dataclasses.asdict(plan.config)}).encode()
    tensors = [
        stored["classes"].clone(),
        stored["channel_class"].clone(),
        torch.tensor(list(description), dtype=torch.uint8),
    ]
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    numbers = PlanNumbers(
        *plan.shape,
        plan.num_states,
        plan.num_active,
        16 if plan.code_dtype == torch.int16 else 8,
        int(plan.config.output_scale),
        int.from_bytes(digest.digest(), "little"),
    )
    return FlatPlan(tensors, list(numbers))


def unflatten(tensors: list[Tensor], numbers: list[int]) -> Plan:
    """The plan of a custom op's call: the one that was flattened, or, in another process, one made anew.

    Raises:
        ValueError: It is made anew, and its operator or hash is registered in no module that was imported here.
    """
    key = tuple(numbers)
    found = _known.get(key)
    if found is None and key in _rebuilt:
        _rebuilt.move_to_end(key)
        found = _rebuilt[key]
    if found is None:
        classes, channel_class, description = tensors
        described = json.loads(description.cpu().numpy().tobytes())
        found = Plan.from_tensors(
            {"classes": classes, "channel_class": channel_class},
            (numbers[0], numbers[1]),
            SketchConfig(**described["config"]),
            described["name"],
        )
        _rebuilt[key] = found
        if len(_rebuilt) > _MOST_REBUILT:
            _rebuilt.popitem(last=False)
    return found


def fake_states(numbers: list[int], device: torch.device) -> list[Tensor]:
    """Tensors of the shapes that :func:`list_states` gives for a plan, with nothing in them."""
    plan = PlanNumbers(*numbers)
    codes = torch.empty(plan.num_states, dtype=torch.int16 if plan.code_bits == 16 else torch.int8, device=device)
    sizes = (plan.num_active, 1, plan.out_features, 1) if plan.output_scale else (plan.num_active, 1)
    return [codes, *(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)]


def list_states(states: States) -> list[Tensor]:
    """States as a custom op takes and returns them: codes, scales, their base, then output scales, if any, and base."""
    return [states[name] for name in _STATES if name in states]


def name_states(tensors: Sequence[Tensor]) -> States:
    """Inverse of :func:`list_states`."""
    return dict(zip(_STATES, tensors, strict=False))


def check_states(states: States, plan: Plan) -> None:
    """Refuse states that the plan was not made for: kernels read them without looking.

    Raises:
        ValueError: Their number or type is another, or they do not lie in one piece on one device.
    """
    for name, count in _numbers_of_states(plan, states["codes"].dtype == torch.uint8).items():
        held = states.get(name, states["codes"][:0])
        kind = (torch.uint8, plan.code_dtype) if name == "codes" else (torch.uint8,)
        if held.dtype not in kind or held.device != states["codes"].device:
            raise ValueError(
                f"{plan.name}: {name} are {held.dtype} on {held.device}; the plan wants {kind[-1]} on one device"
            )
        if held.numel() < count or not held.is_contiguous():
            apart = "" if held.is_contiguous() else ", not in one piece"
            raise ValueError(
                f"{plan.name}: {name} are {held.numel()} numbers{apart}; the plan wants {count} in one piece"
            )


@cached_by_plan
def _numbers_of_states(plan: Plan, packed: bool) -> dict[str, int]:
    codes = plan.bit_breakdown()["states"] // 8 if packed else plan.num_states
    needed = {"codes": codes, "scales": plan.num_active, "scale_base": 1}
    if plan.config.output_scale:
        needed |= {"output_scales": plan.shape[0], "output_scale_base": 1}
    return needed


def packed_states(packed: Tensor, plan: Plan) -> States:
    """States of a packed layer without unpacking them: ``codes`` is the stream itself, uint8.

    Args:
        packed: uint8 [``plan.total_bits / 8``], header first (`usllm/packed/FORMAT.md`).
        plan: The layer's plan.
    """
    scales, output, codes = _first_bytes(plan.handle)
    states = {"codes": packed[codes:], "scales": packed[scales:output], "scale_base": packed[1:2]}
    if plan.config.output_scale:
        states |= {"output_scales": packed[output:codes], "output_scale_base": packed[2:3]}
    return states


def _flat_plan(handle: str) -> FlatPlan:
    return flatten(living_plan(handle))


def _first_bytes(handle: str) -> tuple[int, int, int]:
    """Where scales, output scales and codes begin in a packed layer, in bytes."""
    return _beginnings(living_plan(handle))


@cached_by_plan
def _beginnings(plan: Plan) -> tuple[int, int, int]:
    size = {name: bits // 8 for name, bits in plan.bit_breakdown().items()}
    scales = size["header"] + size["classes"] + size["channel_classes"]
    output = scales + size["scales"]
    return scales, output, output + size["output_scale"]


def absent(dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor, returned for one that was not asked for: custom ops return no ``None``."""
    return torch.empty(0, dtype=dtype, device=device)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (a second, and triton). They
# take a plan's handle: before torch 2.12 no object that is not a constant may go into such a function.
for _function in (_flat_plan, _first_bytes):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # functions have no such attribute for mypy
