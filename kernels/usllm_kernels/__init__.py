"""The sketch at the speed of memory: its operations, each on the fastest backend that is there.

What they compute is defined by :mod:`usllm.sketch`; states and decoded weights are equal to it bit for bit. All are
operators of torch (``torch.ops.usllm``), so that ``torch.compile`` takes them whole.
"""

from usllm_kernels.dispatch import choose
from usllm_kernels.folded.op import folded_linear, folds
from usllm_kernels.matrix_form.query import matrix_query
from usllm_kernels.ops.project.op import project
from usllm_kernels.ops.project_query.op import project_query
from usllm_kernels.ops.query.op import query
from usllm_kernels.ops.sketch_linear.op import sketch_linear
from usllm_kernels.plans import packed_states

__all__ = [
    "choose",
    "folded_linear",
    "folds",
    "matrix_query",
    "packed_states",
    "project",
    "project_query",
    "query",
    "sketch_linear",
]
