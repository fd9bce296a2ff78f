"""``usllm-eval`` in which the plug-in's kernel prints a line for every layer that it decodes.

A process of its own: whether Triton's kernels are interpreted is decided when Triton is imported.
"""

from __future__ import annotations

from typing import Any

from example_plugin import held_channels

from usllm.cli import eval as evaluation

LINE = "the plug-in's kernel decodes"


def watched(states: Any, plan: Any, *arguments: Any) -> Any:
    """The kernel's query, with a line."""
    decoded = ordinary(states, plan, *arguments)
    print(f"{LINE} {plan.name}")
    return decoded


if __name__ == "__main__":
    ordinary, held_channels.query = held_channels.query, watched
    evaluation.main()
