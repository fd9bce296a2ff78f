"""What usllm adds to Lightning's checkpoints: plans, compressor, configuration; its format and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usllm.system.errors import UserError

CHECKPOINT_KEY = "usllm"
CHECKPOINT_FORMAT = 2
READABLE_FORMATS = (1, 2)
"""Format 1 holds sketches alone, with their configuration in one piece."""


def checked_section(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What usllm has written into a checkpoint.

    Raises:
        UserError: not a usllm checkpoint, or one of a format that this version does not know.
    """
    section: dict[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if section is None:
        raise UserError(f"the checkpoint has no {CHECKPOINT_KEY!r} section: it was not written by usllm-train")
    check_format(section)
    return section


def check_format(section: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a format that this version does not know.

    Raises:
        UserError: names both.
    """
    if section["format"] not in READABLE_FORMATS:
        known = " and ".join(map(str, READABLE_FORMATS))
        raise UserError(f"the checkpoint has format {section['format']}, this version of usllm reads {known}")


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
