"""Public names of :mod:`usllm.compress` at the place where users of earlier versions import them from."""

from usllm.compress import (
    CompressedLinear,
    CompressionReport,
    compress_,
    compressed_layers,
    compression_report,
    reproject_,
)

SketchedLinear, sketched_layers = CompressedLinear, compressed_layers

__all__ = [
    "CompressionReport",
    "SketchedLinear",
    "compress_",
    "compression_report",
    "reproject_",
    "sketched_layers",
]
