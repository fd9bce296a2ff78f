"""The rows of the comparison in docs/results.md: one run each, all on the same text and as many tokens.

Standard budget: 409,600 tokens a block, then 122,880 end to end; the paper's sketch as published has them all end to
end. Every method has the learning rates that were best for it in a search on the first block (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

RATES = (0.5, 1.0)
RECIPE = ("experiment=recipe",)
LITTLEBIT = (
    *RECIPE,
    "sketch=littlebit",
    "sketch.paths=2",
    "stages.reconstruct.latent_lr=0.1",
    "stages.reconstruct.scale_lr=4e-3",
    "stages.reconstruct.steps=200",  # of 2,048 tokens, at which its rates were searched
    "stages.reconstruct.batch_size=8",
)
ROUNDING = (*RECIPE, "sketch=rounding", "allocation.layer_budget=equal")
PAPER = ("experiment=paper_smollm2",)
MODEL = "SmolLM2-135M"
GEMMA = (*RECIPE, "model=gemma3_270m", "evaluation.windows=[128]")  # windows as in the one published figure
PAPER_PLUS = (*RECIPE, "sketch.operator=absmaxmin")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: Of its folder and its file.
        method: Its heading in the table.
        overrides: What ``usllm-train`` is asked for.
        rate_of: The row whose achieved bits this one gets as its ceiling.
        long: Whether it is also measured on all windows of 2,048 of WikiText-2.
        trained: Whether it is, on as many tokens as all others.
        model: The one that is compressed; each has tables of its own.
    """

    name: str
    method: str
    overrides: tuple[str, ...]
    rate_of: str | None = None
    long: bool = False
    trained: bool = True
    model: str = MODEL


def _rows() -> list[Row]:
    found = []
    for seed in (0, 1):
        for rate in RATES:
            asked = (f"sketch.bits_per_weight={rate}", f"seed={seed}")
            found.append(Row(f"sign_{rate}_seed{seed}", "sign sketch", (*RECIPE, *asked), long=seed == 0))
            found.append(Row(f"littlebit_{rate}_seed{seed}", "LittleBit", (*LITTLEBIT, *asked)))
    for rate in RATES:
        asked = (f"sketch.bits_per_weight={rate}", "seed=0")
        found.append(Row(f"paper_plus_{rate}", "AbsMaxMin, trained as the sign sketch", (*PAPER_PLUS, *asked)))
        found.append(Row(f"paper_{rate}", "the paper's sketch, as published", (*PAPER, *asked)))
    for bits in (1, 2):
        found.append(Row(f"rounding_{bits}bit", f"rounding, {bits} bit", (*ROUNDING, f"sketch.bits={bits}", "seed=0")))
        strict = f"rounding_{bits}bit"
        found.append(Row(f"sign_as_{strict}", "sign sketch", (*RECIPE, "seed=0"), rate_of=strict))
        found.append(Row(f"littlebit_as_{strict}", "LittleBit", (*LITTLEBIT, "seed=0"), rate_of=strict))
    untrained = ("sketch.bits=4", "sketch.group_size=64", "~stages.reconstruct", "trainer.max_steps=0", "seed=0")
    found.append(Row("rounding_4bit", "rounding, 4 bit, untrained", (*ROUNDING, *untrained), trained=False))
    asked = ("sketch.bits_per_weight=1.0", "seed=0")
    found.append(Row("gemma_1.0", "sign sketch", (*GEMMA, *asked), model="Gemma-3-270M"))
    return found


ROWS = {row.name: row for row in _rows()}
