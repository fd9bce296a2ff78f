"""Start: the first latents and states of every layer."""

from __future__ import annotations

from typing import ClassVar

from usllm.compress import start_
from usllm.stages.base import Stage, Work


class Start(Stage):
    """Latents as the method starts them: the dense weights themselves, or factors made from them.

    It is a function of weights, plans and statistics, so that a killed run makes the same latents again.
    """

    name: ClassVar[str] = "start"
    after: ClassVar[tuple[str, ...]] = ("allocate",)

    def run(self, work: Work) -> None:
        """Give all layers their plans, latents and states; from here on the model is the compressed one."""
        start_(work.model, work.plans, work.statistics)
