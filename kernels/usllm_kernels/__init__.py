"""The sketch at the speed of memory: its operations, each on the fastest back end that is there.

What they compute is defined by :mod:`usllm.sketch`; states and decoded weights are equal to it bit for bit. Each is a
custom op of torch (``torch.ops.usllm``), so that ``torch.compile`` takes it whole. An operation is a folder of ``ops/``
and is found there; its ``reference.py`` is the truth about it.
"""

from importlib import import_module

from usllm_kernels.dispatch import choice_problem, choose, operations, register, supports
from usllm_kernels.ops.block_linear.op import block_linear
from usllm_kernels.ops.plane_linear.op import plane_linear, plane_weight
from usllm_kernels.ops.plane_words.op import Codes, make_planes
from usllm_kernels.ops.project.op import project
from usllm_kernels.ops.project_query.op import project_query
from usllm_kernels.ops.query.op import query
from usllm_kernels.ops.sketch_linear.op import sketch_linear
from usllm_kernels.ops.state_gradient.op import state_gradient_
from usllm_kernels.plans import packed_states
from usllm_kernels.sketch_planes import sketch_planes, sketch_planes_bytes

for _operation in operations():  # a compiled or exported graph asks for the custom ops of all
    import_module(f"usllm_kernels.ops.{_operation}.op")

__all__ = [
    "Codes",
    "block_linear",
    "choice_problem",
    "choose",
    "make_planes",
    "operations",
    "packed_states",
    "plane_linear",
    "plane_weight",
    "project",
    "project_query",
    "query",
    "register",
    "sketch_linear",
    "sketch_planes",
    "sketch_planes_bytes",
    "state_gradient_",
    "supports",
]
