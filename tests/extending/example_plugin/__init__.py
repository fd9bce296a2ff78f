"""A plug-in: what it registers can be chosen with ``plugins=[example_plugin]``, as if it were built in."""

from example_plugin import every_second, lower_median, noise, row_sign, shrunk, square_root  # noqa: F401 (they register themselves)
from usllm_kernels import register

register("query", "triton", "example_plugin.held_channels")  # by name: Triton is imported where a kernel is asked for
