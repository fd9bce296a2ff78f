"""Layers, plans and configurations that hypothesis draws."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, build_plan

shapes = st.tuples(st.integers(1, 90), st.integers(1, 40))


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> SketchConfig:
    """A configuration whose rate leaves room for the tables of a small layer; ``fixed`` fields are not drawn."""
    values = {
        "bits_per_weight": draw(st.sampled_from([3.0, 4.0, 8.0])),
        "rows": draw(st.integers(1, 4)),
        "group_size": draw(st.sampled_from([1, 5, 16, 33, 512])),
        "operator": draw(st.sampled_from(["absmaxmin", "countmin", "mean"])),
        "hash": draw(st.sampled_from(["balanced", "uniform", "shared"])),
        "state_bits": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "rounding": draw(st.sampled_from(["toward_zero", "nearest"])),
        "output_scale": draw(st.booleans()),
        "allocation": draw(st.sampled_from(["uniform", "proportional", "waterfill"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return SketchConfig(**(values | fixed))


@st.composite
def layers(draw: st.DrawFn, **fixed: Any) -> tuple[Tensor, Plan, Tensor]:
    """A weight [out, in], a plan for it, and the importance that the plan was made from."""
    config = draw(configs(**fixed))
    out_features, in_features = draw(shapes.filter(lambda shape: shape[0] * shape[1] >= 120))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(out_features, in_features, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    importance = torch.rand(in_features, generator=generator).pow(6) + 1e-6
    try:
        plan = build_plan((out_features, in_features), importance, config, "layer")
    except ValueError as error:  # the tables of a very small layer can exceed any sensible rate
        assume("too little" not in str(error))
        raise
    return weight, plan, importance
