"""The data sketch: hash, operators, allocation, quantiser, bit count. Pure functions that need torch alone."""

from usllm.sketch.codec import States, channel_scales, project, query
from usllm.sketch.config import SketchConfig
from usllm.sketch.plan import Plan
from usllm.sketch.planning import bit_range, build_plan

__all__ = ["Plan", "SketchConfig", "States", "bit_range", "build_plan", "channel_scales", "project", "query"]
