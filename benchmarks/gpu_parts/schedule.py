"""What is run, in which order, and how the minutes are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DRY_PATIENCE = 10.0  # times that of a card: the interpreter shares its processor with whatever else runs


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        name: In results.
        module: With ``run(session)``.
        share: Of the time, relative to the shares of the parts behind it.
        patience: Seconds after which one measurement has hung and is ended, its part going on behind it.
        workers: Processes that divide its measurements up among them.
        essential: Whether nothing makes sense without it.
        dry_share: The share in a dry run, where the interpreter takes most of the time.
    """

    name: str
    module: str
    share: float
    patience: float = 120.0
    workers: int = 1
    essential: bool = False
    dry_share: float = 20.0


_PACKAGE = "benchmarks.gpu_parts"

ENVIRONMENT = Part("environment", f"{_PACKAGE}.environment", 10.0, patience=90.0, essential=True, dry_share=10.0)
PARTS = (
    # Most of its time goes into compiling kernels, which takes a core each: twelve at a time.
    Part("correctness", f"{_PACKAGE}.correctness", 24.0, patience=60.0, workers=12, dry_share=70.0),
    Part("kernels", f"{_PACKAGE}.kernel_times", 30.0, patience=45.0, dry_share=40.0),
    Part("training", f"{_PACKAGE}.training_steps", 18.0, patience=100.0, dry_share=30.0),
    Part("generation", f"{_PACKAGE}.generation", 12.0, patience=60.0),
)
FINETUNING = Part("finetuning", f"{_PACKAGE}.finetuning", 16.0, patience=3600.0)


def part_end(now: float, end: float, parts: Sequence[Part], dry_run: bool = False) -> float:
    """When the first of the parts to come is over: its share of what is left, all of it if it is the last.

    Args:
        now: Of a clock, in seconds.
        end: When all must be over.
        parts: To come.
        dry_run: Whether the shares are those of a dry run.
    """
    shares = [part.dry_share if dry_run else part.share for part in parts]
    return now + (end - now) * shares[0] / sum(shares)
