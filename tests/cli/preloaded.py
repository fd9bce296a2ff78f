"""What the server of forks has imported before commands, ranks and killed runs are forked from it.

A process of tests has one such server. Without these each of its children imports for five seconds. The server says
nothing of a module that it does not find: ``test_command.py`` looks.
"""

from __future__ import annotations

PRELOADED = [
    *(f"usllm.cli.{name}" for name in ("train", "eval", "export", "generate", "inspect", "report")),
    *("usllm.runs.finetune", "usllm.runs.evaluate", "usllm.runs.export", "usllm.runs.generate", "usllm.runs.inspect"),
    *("usllm.reports.writing", "usllm.runs.sweeps", "transformers.models.llama.modeling_llama"),
    # What commands import only when they need it, and most do: half of their time until a text is read or refused.
    *(f"usllm.compress.methods.{name}" for name in ("sketch", "rounding", "littlebit")),
    *(f"usllm_kernels.ops.{name}.numba" for name in ("project", "project_query", "query", "sketch_linear")),
    *("usllm_kernels.ops.state_gradient.numba", "datasets.load", "hydra.experimental", "torch.distributed.fsdp"),
]
