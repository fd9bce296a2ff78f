"""The sketch at the speed of memory: its operations, each on the fastest backend that is there.

What they compute is defined by :mod:`usllm.sketch`; states and decoded weights are equal to it bit for bit.
"""

from usllm_kernels.project.op import project
from usllm_kernels.project_query.op import project_query
from usllm_kernels.query.op import query

__all__ = ["project", "project_query", "query"]
