"""The seam: compression methods, layers that compute with any of them, and surgery on models. Needs torch alone."""

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.layer import CompressedLinear, Reprojection, compressed_layers
from usllm.compress.parallel import over_layers
from usllm.compress.registry import METHODS, as_compressor, from_section, method, to_section
from usllm.compress.report import CompressionReport, LayerReport, compression_report
from usllm.compress.surgery import (
    DEFAULT_PATTERNS,
    allocate_,
    compress_,
    load_plans_,
    plan_layers,
    recall_winners_,
    reproject_,
    save_plans,
    start_,
    swap_linears_,
)
from usllm.compress.values import Encoded, Fact, Spec, Statistics

__all__ = [
    "DEFAULT_PATTERNS",
    "METHODS",
    "CompressedLinear",
    "CompressionReport",
    "Compressor",
    "Encoded",
    "Fact",
    "LayerPlan",
    "LayerReport",
    "Reprojection",
    "Spec",
    "Statistics",
    "allocate_",
    "as_compressor",
    "compress_",
    "compressed_layers",
    "compression_report",
    "from_section",
    "load_plans_",
    "method",
    "over_layers",
    "plan_layers",
    "recall_winners_",
    "reproject_",
    "save_plans",
    "start_",
    "swap_linears_",
    "to_section",
]
