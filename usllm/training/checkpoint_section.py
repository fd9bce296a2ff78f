"""What usllm adds to Lightning's checkpoints: plans, compressor, configuration; its format and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usllm.system.errors import UserError

CHECKPOINT_KEY = "usllm"
CHECKPOINT_FORMAT = 2
READABLE_FORMATS = (1, 2)
"""Format 1 holds sketches alone, with their configuration in one piece."""
LAST_TO_CONTINUE = {1: "commit 1462762"}
"""By format: the last version in which training goes on from it to the same bits; scales of states are chosen otherwise
since then."""


def checked_section(checkpoint: Mapping[str, Any], to_continue: bool = False) -> dict[str, Any]:
    """What usllm has written into a checkpoint.

    Args:
        to_continue: whether training will go on from it.

    Raises:
        UserError: not a usllm checkpoint, one of a format that this version does not know, or does not continue.
    """
    section: dict[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if section is None:
        raise UserError(f"the checkpoint has no {CHECKPOINT_KEY!r} section: it was not written by usllm-train")
    check_format(section)
    if to_continue:
        refuse_to_continue(section)
    return section


def check_format(section: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a format that this version does not know.

    Raises:
        UserError: names both.
    """
    if section["format"] not in READABLE_FORMATS:
        known = " and ".join(map(str, READABLE_FORMATS))
        raise UserError(f"the checkpoint has format {section['format']}, this version of usllm reads {known}")


def refuse_to_continue(section: Mapping[str, Any], checkpoint: str = "the checkpoint") -> None:
    """Refuse a checkpoint from which training would not go on as it did when it was written.

    Args:
        section: what usllm has written into it.
        checkpoint: what it is called in the message.

    Raises:
        UserError: names the last version that continues it.
    """
    last = LAST_TO_CONTINUE.get(section["format"])
    if last is not None:
        raise UserError(
            f"{checkpoint} has format {section['format']}, and scales of states are chosen otherwise since then: "
            "training would not go on to the same bits. The last version of usllm that continues it is "
            f"{last}; usllm-eval, usllm-export and usllm-generate read it, and a new run takes another name="
        )


def recount_micro_batches_(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Let Lightning's counters of micro batches say what they would if every step had been made of ``now`` of them.

    Validation and the end of the run are counted in micro batches; checkpoints are only written at optimizer steps.

    Args:
        checkpoint: a training checkpoint, changed in place.
        before: micro batches per optimizer step when it was written.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        for moment in count:
            count[moment] += checkpoint["global_step"] * (now - before)
