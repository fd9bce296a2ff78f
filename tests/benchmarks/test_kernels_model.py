"""What the benchmark of a whole model takes for time spent in the sketch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels_model import PRODUCTS, card_time, sketch_time
from usllm.sketch import SketchConfig, build_plan
from usllm_kernels import project, sketch_linear


def test_products_of_the_library_are_not_the_sketchs_time() -> None:
    plan = build_plan((300, 200), None, SketchConfig(bits_per_weight=1.0), "layer")
    weight, x = torch.randn(300, 200, requires_grad=True), torch.randn(64, 200, requires_grad=True)
    states = project(weight, plan)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        sketch_linear(x, states, plan, weight=weight).sum().backward()
    events = profiled.events()
    ours = [event for event in events if event.name in ("usllm::sketch_linear", "usllm::sketch_linear_input_gradient")]
    whole = sum(event.cpu_time_total for event in ours)
    found = sketch_time(events, "cpu_time_total")
    assert len(ours) == 2
    assert 0 < found < whole  # both multiply inside
    products = sum(event.cpu_time_total for event in events if event.name in PRODUCTS)
    assert found > whole - products  # that of the latent gradient lies outside


def test_a_kernels_time_is_counted_once() -> None:
    def event(device: DeviceType, time: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(device_type=device, self_device_time_total=time, is_user_annotation=annotation)

    kernel, its_operator = event(DeviceType.CUDA, 100.0), event(DeviceType.CPU, 100.0)
    assert card_time([kernel, its_operator, event(DeviceType.CUDA, 100.0, annotation=True)]) == 100.0
