"""Where a GGUF file may be written: what is known of one without the libraries that write it."""

from __future__ import annotations

from pathlib import Path

from usllm.system.errors import UserError
from usllm.system.files import unusable

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Types of matrices that can be written."""
WRITER = "usllm"
"""What ``general.quantized_by`` says, the first entry of a file."""
_BEGINNING = 1024
"""Bytes of a file in which its first entry is looked for."""


def check_gguf_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that may not become a GGUF file, before any work; only one that was written here is replaced.

    Raises:
        UserError: it exists and may not be replaced, has another ending, or cannot be written.
    """
    if out.suffix != ".gguf":
        raise UserError(f"out={out}: form=gguf writes one file: give it a name that ends in .gguf")
    if reason := unusable(out):
        raise UserError(f"out={out}: {reason}; give the name of a file")
    if out.is_symlink() or out.exists():
        if out.is_symlink() or not _is_written_here(out):
            raise UserError(
                f"out={out} exists and was not written by usllm-export: it is never replaced, choose another"
            )
        if not overwrite:
            raise UserError(f"out={out} exists already: pass overwrite=true to replace it, or another name")


def _is_written_here(path: Path) -> bool:
    """Whether a file says so in its first entries."""
    with path.open("rb") as file:
        start = file.read(_BEGINNING)
    return start.startswith(b"GGUF") and WRITER.encode() in start.partition(b"general.quantized_by")[2][:32]
