"""The data sketch: hash, operators, allocation, quantiser, bit count. Pure functions that need torch alone."""

from usllm.sketch.allocation import layer_bits
from usllm.sketch.codec import States, channel_scales, project, query
from usllm.sketch.config import SketchConfig
from usllm.sketch.plan import Plan
from usllm.sketch.planning import build_plan, plan_bits

__all__ = ["Plan", "SketchConfig", "States", "build_plan", "channel_scales", "layer_bits", "plan_bits", "project", "query"]
