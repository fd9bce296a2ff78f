"""Layers that compute with their sketch, and the surgery that puts them into a model. Needs torch alone."""

from usllm.compress.parallel import over_layers
from usllm.compress.report import CompressionReport, LayerReport, compression_report
from usllm.compress.sketched_linear import Reprojection, SketchedLinear, sketched_layers
from usllm.compress.straight_through import straight_through
from usllm.compress.surgery import (
    DEFAULT_PATTERNS,
    allocate_,
    compress_,
    load_plans_,
    recall_winners_,
    reproject_,
    save_plans,
    swap_linears_,
)

__all__ = [
    "DEFAULT_PATTERNS",
    "CompressionReport",
    "LayerReport",
    "Reprojection",
    "SketchedLinear",
    "allocate_",
    "compress_",
    "compression_report",
    "load_plans_",
    "over_layers",
    "recall_winners_",
    "reproject_",
    "save_plans",
    "sketched_layers",
    "straight_through",
    "swap_linears_",
]
